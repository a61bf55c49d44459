"""Train a few real steps in several processes and record every collective."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from io import StringIO
from itertools import accumulate as running_sums
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import optim.dopr.distributed
import optim.dopr.exchange
import optim.matrices
from bench.scale import base_plan
from bench.scale.calls import Placement
from bench.scale.shapes import DoprMode, ModelShape
from model import GPT, GPTConfig
from optim import ActivationPreconditioner
from optim.build import build_optimizers
from optim.dopr.capture import accumulate
from optim.dopr.refresh import preconditioned
from optim.process_group import Collective
from trainer.parallel import Parallel

KINDS = {
    "allreduce_": "all_reduce",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
}
RecordedCall = tuple[str, int, int]  # kind, bytes, processes


class CollectiveRecorder(TorchDispatchMode):
    """Record collectives, whether DDP, FSDP2 or our code calls them, in torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[RecordedCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = KINDS[func.overloadpacket.__name__]
            n_bytes = max(sum(tensor.nbytes for tensor in flat(arg)) for arg in args[:2])
            self.calls.append((kind, n_bytes, group_size(args)))
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded() -> Iterator[list[RecordedCall]]:
    """Record collectives, also those of `dopr::reduce_gram`.

    Torch turns a recorder off inside such an operator; here it is turned on again.
    """
    recorder, start = CollectiveRecorder(), Collective.start_reduce_

    def start_recorded(*args: Any) -> Any:
        with recorder:
            return start(*args)

    with recorder, patch.object(Collective, "start_reduce_", start_recorded):
        yield recorder.calls


def flat(value: Any) -> list[Tensor]:
    """Return the tensors of an argument, which may be nested lists."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in flat(part)] if isinstance(value, list) else []


def group_size(args: Any) -> int:
    """Return the number of processes in the group of a collective."""
    objects = [each for each in args if isinstance(each, torch.ScriptObject)]
    (group,) = [each for each in objects if "ProcessGroup" in str(each._type())]
    return distributed.ProcessGroup.unbox(group).size()


@contextmanager
def small_messages() -> Iterator[None]:
    """Bound messages and chunks by a few kB, in the code and in the plan."""
    with (
        patch.object(optim.dopr.exchange, "CHUNK_BYTES", 2**13),
        patch.object(optim.dopr.distributed, "MESSAGE_BYTES", 2**11),
        patch.object(optim.matrices, "MESSAGE_BYTES", 2**12),
        patch.object(base_plan, "MESSAGE_BYTES", 2**12),
    ):
        yield


def steps(
    shape: ModelShape,
    placement: Placement,
    base: str,
    mode: DoprMode | None,
    n: int,
    has_small_messages: bool = False,
) -> list[Any]:
    """Return the collectives of each of n steps: of its two micro-batches, and of its end."""
    with (
        processes(placement) as parallel,
        small_messages() if has_small_messages else nullcontext(),
    ):
        model, forward, optimizers, _ = trainer(shape, parallel, base, placement, mode)
        found: list[Any] = []
        for _ in range(n):
            parts = [micro_batch(shape, parallel, forward, index) for index in range(2)]
            with recorded() as calls:
                for optimizer in optimizers:
                    optimizer.step()
            model.zero_grad()
            found.append((*parts, calls))
        return found


def held(
    shape: ModelShape, placement: Placement, mode: DoprMode, n: int
) -> list[tuple[int, int, int]]:
    """Return the bytes of statistics that this process reports in each of n steps.

    They are those after the backward of each of two micro-batches, and after the step.
    """
    with processes(placement) as parallel:
        model, forward, optimizers, preconditioner = trainer(
            shape, parallel, "adamw", placement, mode
        )

        def reported() -> int:
            preconditioner._reduction.finish()
            return sum(row["bytes"] for row in preconditioner.report() if row["covered"])

        found = []
        for _ in range(n):
            backwards = []
            for index in range(2):
                micro_batch(shape, parallel, forward, index)
                backwards.append(reported())
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
            found.append((*backwards, reported()))
        return found


def peaks(shape: ModelShape, placement: Placement, mode: DoprMode) -> dict[str, int]:
    """Return the most bytes that this process allocates to send sums, and to exchange rows.

    Earlier sums are there, so that those of an owner do not grow.
    """
    with processes(placement) as parallel:
        _, forward, optimizers, preconditioner = trainer(shape, parallel, "adamw", placement, mode)
        micro_batch(shape, parallel, forward, 1)
        for optimizer in optimizers:
            optimizer.step()
        layers = preconditioner.layers
        wide = [layer.capture for layer in layers if layer.covered.d_in > shape.n_embd]

        def send_sums() -> None:
            for each in (wide[0], wide[1], wide[0]):
                each.is_collecting = True
                z = torch.ones(1, 1, each.shape[0] * each.shape[-1])
                accumulate(each, z, grad_y=torch.ones(1, 1, 1))
            each.finish()

        def exchange() -> None:
            for _ in preconditioned(layers, "torch", preconditioner._exchange):
                pass

        return {"backward": peak(send_sums), "exchange": peak(exchange)}


def peak(work: Callable[[], None]) -> int:
    """Return the most bytes that `work` has allocated at a time.

    It is the lowest of several runs, because gloo's threads may free a buffer late.
    """
    found: list[int] = []
    for _ in range(8):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
            work()
        profiler: Any = run.profiler
        events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
        found.append(max(running_sums(changes)))
    return min(found)


@contextmanager
def processes(placement: Placement) -> Iterator[Parallel]:
    """Join the processes of a placement."""
    mode: Any = placement.parallel
    shard_size = placement.shard_size if mode == "hsdp" else None
    with (
        redirect_stderr(StringIO()),
        Parallel(torch.device("cpu"), mode=mode, shard_size=shard_size) as parallel,
    ):
        yield parallel


def trainer(
    shape: ModelShape, parallel: Parallel, base: str, placement: Placement, mode: DoprMode | None
) -> tuple[Any, Any, Any, Any]:
    """Build the model, its wrapped version and its optimizers, as train.py does."""
    sizes = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    model = GPT(GPTConfig(bias=False, **{key: getattr(shape, key) for key in sizes}))
    parallel.place(model)
    options: dict[str, Any] = {
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "momentum": 0.95,
    }
    optimizers = build_optimizers(
        model, optimizer=base, lr=1e-3, **options, process_group=parallel.group()
    )
    preconditioner = None
    if mode:
        settings = mode.settings(shape.n_embd)
        preconditioner = ActivationPreconditioner(
            model, **settings, statistics=placement.statistics
        )
        preconditioner.attach(*optimizers, process_group=parallel.group())
    return model, parallel.wrap(model, is_compiled=False), optimizers, preconditioner


def micro_batch(
    shape: ModelShape, parallel: Parallel, forward: Any, index: int
) -> list[RecordedCall]:
    """Run forward and backward of one of two micro-batches, and return their collectives."""
    parallel.sync_gradients(forward, is_last=index == 1)
    x = torch.arange(2 * shape.block_size).view(2, -1) % shape.vocab_size
    with recorded() as calls:
        forward(x, x)[1].backward()
    return calls
