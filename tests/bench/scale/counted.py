"""Train a few real steps in several processes and record every collective."""

from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

from bench.scale.plan import Placement
from bench.scale.shapes import DoprMode, ModelShape
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


def steps(
    shape: ModelShape, placement: Placement, base: str, mode: DoprMode | None, n: int
) -> list[Any]:
    """Return the collectives of the last of n steps: of its two micro-batches, and of its end."""
    shard_size = placement.shard_size if placement.parallel == "hsdp" else None
    with (
        redirect_stderr(StringIO()),
        Parallel(torch.device("cpu"), mode=placement.parallel, shard_size=shard_size) as parallel,
    ):
        model, forward, optimizers = trainer(shape, parallel, base, mode)
        recorded: list[Any] = []
        for _ in range(n):
            recorded = [step(shape, parallel, forward, optimizers, micro) for micro in range(2)]
            with CollectiveRecorder() as recorder:
                for optimizer in optimizers:
                    optimizer.step()
            model.zero_grad()
            recorded.append(recorder.calls)
        return recorded


def trainer(
    shape: ModelShape, parallel: Parallel, base: str, mode: DoprMode | None
) -> tuple[Any, Any, Any]:
    """Build the model, its wrapped version and its optimizers, as train.py does."""
    sizes = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    model = GPT(GPTConfig(bias=False, **{key: getattr(shape, key) for key in sizes}))
    parallel.place(model)
    options = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "momentum": 0.95}
    optimizers = build_optimizers(
        model, optimizer=base, lr=1e-3, **options, process_group=parallel.group()
    )
    if mode:
        preconditioner = ActivationPreconditioner(model, **mode.settings(shape.n_embd))
        preconditioner.attach(*optimizers, process_group=parallel.group())
    return model, parallel.wrap(model, is_compiled=False), optimizers


def step(
    shape: ModelShape, parallel: Parallel, forward: Any, optimizers: Any, micro: int
) -> list[RecordedCall]:
    """Run forward and backward of one of two micro-batches, and return their collectives."""
    parallel.sync_gradients(forward, is_last=micro == 1)
    x = torch.arange(2 * shape.block_size).view(2, -1) % shape.vocab_size
    with CollectiveRecorder() as recorder:
        forward(x, x)[1].backward()
    return recorder.calls
