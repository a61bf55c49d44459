"""Collective operations over the processes that train one model, and layouts of sharded tensors.

A parameter is either a plain tensor with the same values in every process (one process, DDP) or a
DTensor of which every process stores some rows (FSDP2) or columns (row-parallel layers). `local`
returns the local part of any of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed

ProcessGroup = Any  # torch.distributed.ProcessGroup, which some builds of torch do not have


class Collective:
    """Sum, reduce, broadcast and compare over a process group. None: this process alone."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.size = 1 if group is None else distributed.get_world_size(group)
        self.rank = 0 if group is None else distributed.get_rank(group)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over all processes and return it."""
        self.wait([self.start_sum_(tensor)])
        return tensor

    def start_sum_(self, tensor: Tensor) -> Any:
        """Start `sum_` and return its handle. Pass the handle to `wait` before using `tensor`."""
        if self.size > 1:
            return distributed.all_reduce(tensor, group=self.group, async_op=True)
        return None

    def start_reduce_(self, tensor: Tensor, destination: int) -> Any:
        """Start to replace `tensor` of rank `destination` by the sum; return a handle.

        The tensors of the other processes have arbitrary values afterwards.
        """
        if self.group is not None and self.size > 1:
            rank = distributed.get_global_rank(self.group, destination)
            return distributed.reduce(tensor, rank, group=self.group, async_op=True)
        return None

    def start_broadcast_(self, tensor: Tensor, source: int) -> Any:
        """Start to replace `tensor` by that of rank `source` in the group; return a handle."""
        if self.group is not None and self.size > 1:
            rank = distributed.get_global_rank(self.group, source)
            return distributed.broadcast(tensor, rank, group=self.group, async_op=True)
        return None

    def check_same(self, description: str, device: torch.device) -> None:
        """Raise ValueError in every process unless all of them pass the same `description`."""
        checksum = zlib.crc32(description.encode())
        digest = torch.tensor([checksum, checksum**2 % 2**31], device=device)
        if not torch.equal(self.sum_(digest.clone()), digest * self.size):
            raise ValueError(
                f"the {self.size} processes do not precondition the same layers with the same "
                "settings; use the same model and settings in all processes, or pass those that "
                f"train one model together as process_group. Process {self.rank}: {description}"
            )

    @staticmethod
    def wait(works: Iterable[Any]) -> None:
        """Wait for what `start_sum_`, `start_reduce_` and `start_broadcast_` returned."""
        for work in works:
            if work is not None:
                work.wait()


def everybody() -> Collective:
    """Return a group of all processes, or the current process without torch.distributed.

    All processes must call this function. A separate group keeps its traffic independent of that of
    the default group. It is made once for each default group, and lives as long: to destroy it
    earlier, all processes would have to do so at about the same time.
    """
    if n_processes() == 1:
        return Collective()
    default = distributed.group.WORLD
    if default not in _everybody:
        _everybody[default] = distributed.new_group()
    return Collective(_everybody[default])


# {default group: the one that `everybody` made for it}. A strong reference to a default group would
# keep its store, which the next one at the same address would meet.
_everybody: WeakKeyDictionary[Any, ProcessGroup] = WeakKeyDictionary()


def n_processes() -> int:
    """Return the number of processes of torch.distributed, or 1 if it is not initialized."""
    is_parallel = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_parallel else 1


def is_sharded(tensor: Tensor) -> bool:
    """Return whether `tensor` is a DTensor, without importing DTensor."""
    return hasattr(tensor, "placements")


def local(tensor: Any) -> Tensor:
    """Return the part of a tensor that this process stores, as a view."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def row_mesh_dim(tensor: Any) -> int | None:
    """Return the mesh dimension over which the rows of a DTensor are sharded.

    Returns None if this process stores all rows.

    Raises:
        ValueError: if the tensor has any other layout. Products with P and orthogonalization need
            whole rows.
    """
    sharded = _mesh_dims(tensor)
    if len(sharded) > 1 or any(str(tensor.placements[i]) != "S(0)" for i in sharded):
        raise ValueError(
            f"its layout is {tuple(tensor.placements)}: only rows may be sharded, over one mesh "
            "dimension (Shard(0), as FSDP2 does), not columns (Shard(1), as row-parallel layers do)"
        )
    return sharded[0] if sharded else None


def column_mesh_dim(tensor: Any) -> int | None:
    """Return the mesh dimension over which the columns of a matrix are sharded.

    Returns None if this process stores whole rows, which may be sharded in any way.

    Raises:
        ValueError: if the columns are sharded over several mesh dimensions, or the tensor is a sum
            over processes.
    """
    sharded = _mesh_dims(tensor)
    columns = [i for i in sharded if getattr(tensor.placements[i], "dim", None) == 1]
    if len(columns) > 1 or any(tensor.placements[i].is_partial() for i in sharded):
        raise ValueError(
            f"its layout is {tuple(tensor.placements)}: columns may be sharded over one mesh "
            "dimension only (Shard(1), as row-parallel layers do)"
        )
    return columns[0] if columns else None


def last_mesh_ranks(tensor: Any) -> tuple[int, ...]:
    """Return the ranks, in the default group, of this process's last dimension of a DTensor's mesh.

    That is the tensor-parallel dimension if there is one, because FSDP2 puts its own first.
    """
    mesh = tensor.device_mesh
    return (*distributed.get_process_group_ranks(mesh.get_group(mesh.ndim - 1)),)


def _mesh_dims(tensor: Any) -> list[int]:
    """Return the dimensions of a DTensor's mesh over which processes store different parts."""
    if not is_sharded(tensor):
        return []
    return [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]


def first_row(tensor: Any) -> int:
    """Return the index of the first local row among all rows of the tensor."""
    dim = row_mesh_dim(tensor)
    if dim is None:
        return 0
    mesh = tensor.device_mesh
    return row_bounds(tensor.shape[0], mesh.size(dim))[mesh.get_local_rank(dim)]


def row_bounds(n_rows: int, size: int) -> list[int]:
    """Return the first row of each of `size` processes, then `n_rows`, as torch.chunk splits."""
    chunk = -(-n_rows // size)
    return [min(rank * chunk, n_rows) for rank in range(size + 1)]


def owners(costs: Sequence[float], size: int) -> list[int]:
    """Assign each piece of work to one of `size` processes and return their ranks.

    Greedy: the most expensive piece first, each to the process with the least work so far.
    """
    load = [0.0] * size
    owner = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner[i] = min(range(size), key=load.__getitem__)
        load[owner[i]] += costs[i]
    return owner
