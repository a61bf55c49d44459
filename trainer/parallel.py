"""Train one model on several processes: process group, placement of the model, collectives.

torchrun starts the processes. With a single process, no method communicates.

    ddp    every process has all weights; gradients are averaged
    fsdp   every process has some rows of every weight, its gradient and its optimizer state
    hsdp   fsdp within groups of `shard_size` consecutive processes, ddp between the groups
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout, suppress
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from trainer.agreement import Agreement
from trainer.failures import ProcessLost, cause_of_loss, first_line, is_consequence
from trainer.sharding import full_model, full_tensor, make_mesh, shard, transformer_blocks
from trainer.torchrun import environment_number, world_size

ParallelMode = Literal["ddp", "fsdp", "hsdp"]
FROM_TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def parallel_problems(settings: dict[str, Any]) -> list[str]:
    """Return a message for each setting that this number of processes cannot satisfy."""
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
    if settings["parallel"] == "hsdp" and shard_size and size % shard_size:
        problems.append(f"shard_size={shard_size}: must divide the number of processes, {size}")
    return problems


class Parallel(Agreement):
    """The process with rank `rank` among `size` processes.

    Its base class has the decisions that the processes take together. Used as a context manager
    that creates the process group on entry. On exit, all processes wait for each other; if this
    process failed only because another one did, ProcessLost is raised, which names that process and
    its error.

    Args:
        device: device of this process. With "cuda", each process takes the GPU of its local rank.
        mode: how the model is distributed; see the module's docstring.
        shard_size: number of processes that hold one copy of the model (hsdp only).
        timeout_s: seconds that a process waits for the others before it fails.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        mode: ParallelMode = "ddp",
        shard_size: int | None = None,
        timeout_s: int = 600,
    ) -> None:
        self.size, self.rank = world_size(), environment_number("RANK", 0)
        self.device, self.mode, self.shard_size = device, mode, shard_size
        self._timeout = timedelta(seconds=timeout_s)
        self._redirection = ExitStack()
        self._mesh: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def __enter__(self) -> Parallel:
        if self.size == 1:
            return self
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        backend = "gloo"
        if self.device.type == "cuda":
            self.device = torch.device("cuda", environment_number("LOCAL_RANK", 0))
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        try:
            self._store, *_ = next(iter(rendezvous("env://", timeout=self._timeout)))
            distributed.init_process_group(
                backend,
                store=PrefixStore("world", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=self._timeout,
            )
        except distributed.DistError as error:
            raise ProcessLost(
                f"the {self.size} processes did not find each other within "
                f"{self._timeout.total_seconds():.0f} s (timeout_s) at MASTER_ADDR="
                f"{os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}: "
                f"{first_line(error)}. Start all of them, and use a free port"
            ) from error
        if self.mode != "ddp":
            self._mesh = make_mesh(self.device.type, self.size, self.shard_size, self._timeout)
        if not self.is_main:
            devnull = self._redirection.enter_context(open(os.devnull, "w"))
            self._redirection.enter_context(redirect_stdout(devnull))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._redirection.close()
        if self.size == 1:
            return
        if error is None:
            try:
                distributed.barrier()
            except RuntimeError as lost:
                raise ProcessLost(cause_of_loss(self._store, self.rank, self.size)) from lost
            distributed.destroy_process_group()
        elif is_consequence(error):
            raise ProcessLost(cause_of_loss(self._store, self.rank, self.size)) from error
        else:
            with suppress(RuntimeError):  # the store may have ended too; `error` matters more
                self._store.set(f"cause/{self.rank}", f"{type(error).__name__}: {error}")

    # -- the model

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are sharded over the processes: under fsdp and hsdp."""
        return self._mesh is not None

    def place(self, model: nn.Module) -> None:
        """Move `model` to the device and, under fsdp and hsdp, shard it (`sharding.shard`)."""
        if self._mesh is None:
            model.to(self.device)
        else:
            shard(model, self._mesh)

    def wrap(self, model: nn.Module, *, is_compiled: bool) -> Any:
        """Return a callable for training that averages the gradients over the processes."""
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
        """Copy `batch` to the device; asynchronously, from pinned memory, to a GPU."""
        if self.device.type != "cuda":
            return batch.to(self.device)
        return batch.pin_memory().to(self.device, non_blocking=True)

    def sync_gradients(self, forward: Any, *, is_last: bool) -> None:
        """Set whether the next backward averages the gradients; call it before each micro-batch.

        Under fsdp and hsdp, every backward sums the gradients into the shards to save memory, and
        the last one also averages them over the replicas of hsdp.
        """
        if self._mesh is not None:
            forward.set_requires_all_reduce(is_last)
            forward.set_is_last_backward(is_last)
        elif self.size > 1:
            forward.require_backward_grad_sync = is_last

    def reshard(self, model: Any) -> None:
        """Free the weights that were gathered for a forward without a backward."""
        if self._mesh is not None:
            model.reshard()

    def full_model(self, model: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
        """Return `model`, or a copy built by `make` with all weights if `model` is sharded."""
        return model if self._mesh is None else full_model(model, make)

    def seed(self, seed: int) -> None:
        """Seed torch's generators of the CPU and of the device.

        torch.manual_seed also seeds all other kinds of devices, which takes much longer.
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    # -- tensors: all processes must call these methods together

    def group(self, backend: str | None = None) -> Any:
        """Create a group of all processes with its own communicator; None with one process."""
        if self.size == 1:
            return None
        return distributed.new_group(timeout=self._timeout, backend=backend)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the processes, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def shard_rows(self, rows: Tensor) -> Tensor:
        """Return this process's share of `rows`; shares wrap around so that all are equal."""
        each = -(-len(rows) // self.size)
        return rows[torch.arange(self.rank * each, (self.rank + 1) * each) % len(rows)]

    def gather_rows(self, share: Tensor, n: int) -> Tensor:
        """Reverse `shard_rows`: return the n rows from the shares that the processes pass."""
        if self.size == 1:
            return share
        shares = [torch.empty_like(share) for _ in range(self.size)]
        distributed.all_gather(shares, share.contiguous())
        return torch.cat(shares)[:n]

    def full_state_on_main(self, tree: Any) -> Any:
        """Gather tensors in nested dicts and lists on the main process's CPU; None elsewhere."""
        if isinstance(tree, Tensor):
            tensor = full_tensor(tree.detach())
            return tensor.cpu() if self.is_main else None
        if isinstance(tree, dict):
            return {key: self.full_state_on_main(value) for key, value in tree.items()}
        return [self.full_state_on_main(each) for each in tree] if isinstance(tree, list) else tree
