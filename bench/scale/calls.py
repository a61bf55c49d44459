"""Describe where a model is placed, and a collective of its processes."""

from functools import lru_cache
from math import prod
from typing import Literal, NamedTuple

from optim.dopr.settings import Sharing
from optim.process_group import row_bounds

Kind = Literal["all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all"]
Over = Literal["all", "shard", "replicate"]
FP32, FP64 = 4, 8  # bytes


class Placement(NamedTuple):
    """How `trainer.parallel.Parallel` distributes a model over GPUs."""

    parallel: str  # ddp, fsdp or hsdp
    size: int  # GPUs
    shard_size: int = 8  # GPUs that hold one copy of the weights with hsdp
    statistics: Sharing = "auto"  # sharded if the weights are

    @property
    def shards(self) -> int:
        """The number of GPUs that hold one copy of the weights."""
        return {"ddp": 1, "fsdp": self.size, "hsdp": self.shard_size}[self.parallel]

    @property
    def copies(self) -> int:
        """The number of copies of the weights."""
        return self.size // self.shards

    @property
    def shares_statistics(self) -> bool:
        """Whether only one GPU of each copy, the owner, holds the statistics of a layer."""
        return self.shards > 1 and self.statistics != "replicated"

    @property
    def inverters(self) -> int:
        """The number of GPUs that share the inverses of one set of statistics."""
        return self.shards if self.shares_statistics else self.size

    @property
    def owners(self) -> int:
        """The number of GPUs that share the matrices in optim/matrices.py."""
        return self.size if self.shards == 1 else self.shards

    def ranks(self, over: Over) -> int:
        return {"all": self.size, "shard": self.shards, "replicate": self.copies}[over]


class CollectiveCall(NamedTuple):
    """One collective: its kind, its bytes, and the processes that take part.

    The bytes are those of the whole tensor: the result of an all_gather, the input of a
    reduce_scatter. For an all_to_all, they are the most that one process sends or receives.
    """

    kind: Kind
    n_bytes: int
    over: Over = "all"


def sent_bytes(call: CollectiveCall, placement: Placement) -> float:
    """Return the mean bytes that a GPU sends with the best algorithm, a ring.

    For an all_to_all, return the most that one GPU sends or receives.
    """
    n = placement.ranks(call.over)
    if n == 1:
        return 0.0
    rounds = 2 if call.kind == "all_reduce" else 1
    return call.n_bytes * rounds * (n - 1) / n


def rows_call(
    shapes: list[tuple[int, ...]], owner: list[int], placement: Placement, rank: int | None
) -> CollectiveCall:
    """Return the collective of `Rows` that takes rows to their owners, or back from them.

    Args:
        shapes, owner: of the matrices.
        rank: the process whose bytes count; None: the one with the most. No process has more rows
            than the first.
    """
    size = placement.shards
    received = dict.fromkeys(range(size), 0)
    for each, owning_rank in zip(shapes, owner, strict=True):
        received[owning_rank] += prod(each)
    here = rank or 0
    sent = sum(n_rows(each[0], size, here) * each[1] for each in shapes)
    most = max(received.values()) if rank is None else received[rank]
    return CollectiveCall("all_to_all", FP32 * max(sent, most), "shard")


@lru_cache
def n_rows(total: int, size: int, rank: int) -> int:
    """Return how many rows of a matrix a process has."""
    bounds = row_bounds(total, size)
    return bounds[rank + 1] - bounds[rank]
