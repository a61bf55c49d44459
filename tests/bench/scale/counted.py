"""A few real steps in each of several processes, with every collective that torch is asked for."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

from bench.scale.plan import Placement
from bench.scale.shapes import Mode, Shape
from model import GPT, GPTConfig
from optim import ActivationPreconditioner
from optim.build import build_optimizers
from trainer.parallel import Parallel

KINDS = {
    "allreduce_": "all_reduce",
    "broadcast_": "broadcast",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
}
Counted = tuple[str, int, int]  # kind, bytes, processes


class Recorder(TorchDispatchMode):
    """Collectives of DDP, FSDP2 and of our own: all pass through torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Counted] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = KINDS[func.overloadpacket.__name__]
            n_bytes = max(sum(each.nbytes for each in flat(arg)) for arg in args[:2])
            self.calls.append((kind, n_bytes, size_of_group(args)))
        return func(*args, **(kwargs or {}))


def flat(value: Any) -> list[Tensor]:
    """The tensors of an argument."""
    if isinstance(value, Tensor):
        return [value]
    return [each for part in value for each in flat(part)] if isinstance(value, list) else []


def size_of_group(args: Any) -> int:
    objects = [each for each in args if isinstance(each, torch.ScriptObject)]
    (group,) = [each for each in objects if "ProcessGroup" in str(each._type())]
    return distributed.ProcessGroup.unbox(group).size()


def steps(shape: Shape, placement: Placement, base: str, mode: Mode | None, n: int) -> list[Any]:
    """Collectives of the last of n steps: of its two micro-batches, and of its end."""
    shard_size = placement.shard_size if placement.parallel == "hsdp" else None
    with (
        redirect_stderr(StringIO()),
        Parallel(torch.device("cpu"), mode=placement.parallel, shard_size=shard_size) as parallel,
    ):
        model, forward, optimizers = trainer(shape, parallel, base, mode)
        found: list[Any] = []
        for _ in range(n):
            found = [step(shape, parallel, forward, optimizers, micro) for micro in range(2)]
            with Recorder() as recorder:
                for optimizer in optimizers:
                    optimizer.step()
            model.zero_grad()
            found.append(recorder.calls)
        return found


def trainer(shape: Shape, parallel: Parallel, base: str, mode: Mode | None) -> tuple[Any, Any, Any]:
    """Model, what is called in training, and its optimizers, put together as train.py does."""
    sizes = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    model = GPT(GPTConfig(bias=False, **{key: getattr(shape, key) for key in sizes}))
    parallel.place(model)
    numbers = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "momentum": 0.95}
    optimizers = build_optimizers(
        model, optimizer=base, lr=1e-3, **numbers, process_group=parallel.group()
    )
    if mode:
        preconditioner = ActivationPreconditioner(model, **mode.settings(shape.n_embd))
        preconditioner.attach(*optimizers, process_group=parallel.group())
    return model, parallel.wrap(model, is_compiled=False), optimizers


def step(
    shape: Shape, parallel: Parallel, forward: Any, optimizers: Any, micro: int
) -> list[Counted]:
    """Forward and backward of one of two micro-batches."""
    parallel.sync_gradients(forward, is_last=micro == 1)
    x = torch.arange(2 * shape.block_size).view(2, -1) % shape.vocab_size
    with Recorder() as recorder:
        forward(x, x)[1].backward()
    return recorder.calls
