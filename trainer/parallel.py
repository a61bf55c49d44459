"""The processes that train one model together: who they are, how the model lies on them, what they
agree on. torchrun starts them; with one process every method is the identity, or nearly.

    ddp    every process has all weights; gradients are averaged
    fsdp   every process has some rows of every weight, and of its gradient and optimizer state
    hsdp   as fsdp within `shard_size` consecutive processes, as ddp between these
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout, suppress
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, distributed, nn

from trainer.failures import ProcessLost, cause_of_loss, is_aftermath
from trainer.sharding import full, gathered, make_mesh, shard, transformer_blocks

ParallelMode = Literal["ddp", "fsdp", "hsdp"]
Result = TypeVar("Result")
FROM_TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def parallel_problems(settings: dict[str, Any]) -> list[str]:
    """What the settings ask that cannot be with this number of processes."""
    size, shard_size = world_size(), settings["shard_size"]
    batch_size, micro_batch_size = settings["batch_size"], settings["micro_batch_size"]
    problems = []
    if size > 1 and (absent := [key for key in FROM_TORCHRUN if key not in os.environ]):
        problems.append(
            f"WORLD_SIZE={size}, but {', '.join(absent)} is not set: start several processes with "
            "torchrun, or unset WORLD_SIZE to train in one process"
        )
    if size > 1 and micro_batch_size > 0 and batch_size % (size * micro_batch_size):
        problems.append(
            f"batch_size={batch_size}: must be divisible by the number of processes times "
            f"micro_batch_size = {size} * {micro_batch_size} = {size * micro_batch_size}"
        )
    if settings["parallel"] == "hsdp" and size > 1 and shard_size and size % shard_size:
        problems.append(f"shard_size={shard_size}: must divide the number of processes, {size}")
    return problems


class Parallel:
    """One of `size` processes. Used as a context manager, on leaving which all wait for each other.

    Args:
        device: of this process; of several with "cuda", each takes its own.
        timeout_s: seconds that a process waits for the others before it gives up.
    Raises, on leaving:
        ProcessLost: this process failed because another one did; says which, and why.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        mode: ParallelMode = "ddp",
        shard_size: int | None = None,
        timeout_s: int = 600,
    ) -> None:
        self.size, self.rank = world_size(), int(os.environ.get("RANK", 0))
        self.device, self.mode, self.shard_size = device, mode, shard_size
        self._timeout = timedelta(seconds=timeout_s)
        self._open = ExitStack()
        self._mesh: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def __enter__(self) -> Parallel:
        if self.size == 1:
            return self
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        backend = "gloo"
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        self._store, *_ = next(iter(rendezvous("env://", timeout=self._timeout)))
        distributed.init_process_group(
            backend,
            store=PrefixStore("world", self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=self._timeout,
        )
        if self.mode != "ddp":
            self._mesh = make_mesh(self.device.type, self.size, self.shard_size, self._timeout)
        if not self.is_main:
            nowhere = self._open.enter_context(open(os.devnull, "w"))
            self._open.enter_context(redirect_stdout(nowhere))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._open.close()
        if self.size == 1:
            return
        if error is None:
            distributed.barrier()
            distributed.destroy_process_group()
        elif is_aftermath(error):
            raise ProcessLost(cause_of_loss(self._store, self.rank, self.size)) from error
        else:
            with suppress(RuntimeError):  # the store may be gone, too; `error` is what counts
                self._store.set(f"cause/{self.rank}", f"{type(error).__name__}: {error}")

    # -- the model

    def place(self, model: nn.Module) -> None:
        """Move `model` to the device; under fsdp and hsdp, only the rows that this process holds.

        See `placement.shard`.
        """
        if self._mesh is None:
            model.to(self.device)
        else:
            shard(model, self._mesh)

    def wrap(self, model: nn.Module, *, is_compiled: bool) -> Any:
        """What is called in training: `model`, with its gradients averaged over the processes."""
        if self._mesh is not None:
            for block in transformer_blocks(model) if is_compiled else ():
                block.compile()
            return model
        forward = torch.compile(model) if is_compiled else model
        if self.size == 1:
            return forward
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(forward, gradient_as_bucket_view=True)

    def to_device(self, batch: Tensor) -> Tensor:
        """`batch` on the device; to a GPU from pinned memory, which the host need not wait for."""
        pinned = batch.pin_memory() if self.device.type == "cuda" else batch
        return pinned.to(self.device, non_blocking=True)

    def sync_gradients(self, forward: Any, *, is_last: bool) -> None:
        """Before a micro-batch: whether its backward is the one that averages the gradients.

        Where they are sharded, they are summed to the shards at once, to keep memory low, and
        between the replicas of hsdp in the last.
        """
        if self._mesh is not None:
            forward.set_requires_all_reduce(is_last)
            forward.set_is_last_backward(is_last)
        elif self.size > 1:
            forward.require_backward_grad_sync = is_last

    def reshard(self, model: Any) -> None:
        """After a forward without a backward: give up the weights that were gathered for it."""
        if self._mesh is not None:
            model.reshard()

    def whole(self, model: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
        """A model like `model` with all weights here; `make` is asked for one if it is sharded."""
        if self._mesh is None:
            return model
        return gathered(model, make)

    # -- tensors

    def group(self) -> Any:
        """A new group of all processes, for traffic that waits for no other; None with one."""
        return distributed.new_group(timeout=self._timeout) if self.size > 1 else None

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the processes, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        return self.sum(tensor) / self.size if self.size > 1 else tensor

    def shard_rows(self, rows: Tensor) -> Tensor:
        """This process's share of `rows`; of too few, some rows are in several shares."""
        each = -(-len(rows) // self.size)
        return rows[torch.arange(self.rank * each, (self.rank + 1) * each) % len(rows)]

    def gather_rows(self, share: Tensor, n: int) -> Tensor:
        """The n rows that the shares of all processes are the rows of `my_rows` of."""
        if self.size == 1:
            return share
        shares = [torch.empty_like(share) for _ in range(self.size)]
        distributed.all_gather(shares, share.contiguous())
        return torch.cat(shares)[:n]

    def saved(self, tree: Any) -> Any:
        """Nested dicts and lists with whole tensors on the CPU; without tensors elsewhere than in
        the main process. All processes must call this."""
        if isinstance(tree, Tensor):
            whole = full(tree.detach())
            return whole.cpu() if self.is_main else None
        if isinstance(tree, dict):
            return {key: self.saved(value) for key, value in tree.items()}
        return [self.saved(value) for value in tree] if isinstance(tree, list) else tree

    # -- decisions

    def all_reduce_flag(self, value: int) -> int:
        """The largest of the processes' values, in all of them."""
        if self.size == 1:
            return value
        largest = torch.tensor(value)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        return int(largest)

    def gather(self, value: Any) -> list[Any]:
        """What every process passes, in order of rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def raise_on_all_ranks(self, function: Callable[[], Result], kind: type[Exception]) -> Result:
        """What `function` returns; an error of this kind in one process is raised in all."""
        result, error = None, None
        try:
            result = function()
        except kind as caught:
            error = caught
        if self.all_reduce_flag(error is not None):
            messages = self.gather(error and str(error))
            rank, message = next((r, text) for r, text in enumerate(messages) if text is not None)
            raise error or kind(f"rank {rank}: {message}")
        return result  # pyright: ignore - it is one

    def main_process_first(self, function: Callable[[], Result]) -> Result:
        """What `function` returns, called in the main process of each machine before the others.

        It may write a file that they all read.
        """
        is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        result = function() if is_first else None
        self.all_reduce_flag(0)
        return result if is_first else function()  # pyright: ignore - it is one
