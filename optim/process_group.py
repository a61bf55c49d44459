"""What the processes that train one model do together in the optimizers; one alone does nothing.

A parameter is a plain tensor, the same in every process (one process, DDP), or a DTensor, of which
every process holds some rows (FSDP2): `local` is what is here of either.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

ProcessGroup = Any  # torch.distributed.ProcessGroup, which not every build of torch has


class Collective:
    """Sums and broadcasts over a group of processes; None is this process alone."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.size = 1 if group is None else distributed.get_world_size(group)
        self.rank = 0 if group is None else distributed.get_rank(group)

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor`, replaced by its sum over the processes."""
        self.wait([self.start_sum_(tensor)])
        return tensor

    def start_sum_(self, tensor: Tensor) -> Any:
        """The same, under way: `wait` for what is returned."""
        if self.size > 1:
            return distributed.all_reduce(tensor, group=self.group, async_op=True)
        return None

    def start_broadcast_(self, tensor: Tensor, source: int) -> Any:
        """`tensor`, replaced by that of the process with rank `source` in the group, under way."""
        if self.group is not None and self.size > 1:
            rank = distributed.get_global_rank(self.group, source)
            return distributed.broadcast(tensor, rank, group=self.group, async_op=True)
        return None

    def check_same(self, description: str, device: torch.device) -> None:
        """Raise ValueError in every process if they do not all pass the same text."""
        own = zlib.crc32(description.encode())
        digest = torch.tensor([own, own**2 % 2**31], device=device)
        if not torch.equal(self.sum_(digest.clone()), digest * self.size):
            raise ValueError(
                f"process {self.rank} of {self.size} preconditions other layers, or with other "
                "settings, than the rest; if not all processes train one model together, pass "
                f"those that do as process_group. Here: {description}"
            )

    @staticmethod
    def wait(works: Iterable[Any]) -> None:
        for work in works:
            if work is not None:
                work.wait()


def everybody() -> Collective:
    """All processes, in a group of its own, so that its traffic waits for nobody else's.

    Every process has to call this. Without torch.distributed: this process alone.
    """
    if n_processes() == 1:
        return Collective()
    return Collective(distributed.new_group())


def n_processes() -> int:
    is_parallel = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_parallel else 1


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, which is not imported for the question."""
    return hasattr(tensor, "placements")


def local(tensor: Any) -> Tensor:
    """The part of a tensor that is in this process, not a copy."""
    with torch.no_grad():
        return tensor.to_local() if is_sharded(tensor) else tensor


def row_mesh_dim(tensor: Any) -> int | None:
    """The dimension of a DTensor's mesh over which its rows are spread; None: all are here.

    Raises ValueError for any other layout: a product with P, or an orthogonalisation by owners,
    needs whole rows.
    """
    if not is_sharded(tensor):
        return None
    spread = [i for i, each in enumerate(tensor.placements) if not each.is_replicate()]
    if len(spread) > 1 or any(str(tensor.placements[i]) != "S(0)" for i in spread):
        raise ValueError(
            f"its layout is {tuple(tensor.placements)}: only whole rows may be spread (Shard(0), "
            "as FSDP2 does, over one dimension of the mesh), not columns (Shard(1), row-parallel)"
        )
    return spread[0] if spread else None


def first_row(tensor: Any) -> int:
    """The number of the first row that is here, among all rows of the tensor."""
    dim = row_mesh_dim(tensor)
    if dim is None:
        return 0
    mesh = tensor.device_mesh
    return row_bounds(tensor.shape[0], mesh.size(dim))[mesh.get_local_rank(dim)]


def row_bounds(n_rows: int, size: int) -> list[int]:
    """Where the rows of each of `size` processes begin, and the end: as torch.chunk cuts them."""
    each = -(-n_rows // size)
    return [min(rank * each, n_rows) for rank in range(size + 1)]


def owners(costs: Sequence[float], size: int) -> list[int]:
    """Who does which piece of work: the costliest first, each to whom has least so far."""
    load = [0.0] * size
    owner = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner[i] = min(range(size), key=load.__getitem__)
        load[owner[i]] += costs[i]
    return owner
