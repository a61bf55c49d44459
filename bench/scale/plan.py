"""Every collective of an optimizer step, with its bytes, as the code asks for them.

tests/bench/scale/test_plan.py counts them in real runs of two to four processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Literal, NamedTuple

from torch import Tensor

from bench.scale.shapes import Mode, Shape, gpt, layers, matrices, units
from optim.dopr.distributed import messages, owners_of, packed_numel, sent_sizes
from optim.dopr.layer import Layer
from optim.matrices import owners_of as owners_of_matrices

Kind = Literal["all_reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all"]
Over = Literal["all", "shard", "replicate"]
FP32, FP64 = 4, 8  # bytes
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes; DistributedDataParallel's defaults


class Placement(NamedTuple):
    """As `dist.World`: how many GPUs, and how many of them hold one copy of the weights."""

    parallel: str  # ddp, fsdp or hsdp
    size: int
    shard_size: int = 8  # of hsdp

    @property
    def shards(self) -> int:
        return {"ddp": 1, "fsdp": self.size, "hsdp": self.shard_size}[self.parallel]

    @property
    def copies(self) -> int:
        return self.size // self.shards

    @property
    def owners(self) -> int:
        """GPUs that share the matrices of optim/matrices.py."""
        return self.size if self.shards == 1 else self.shards

    def ranks(self, over: Over) -> int:
        return {"all": self.size, "shard": self.shards, "replicate": self.copies}[over]


class Call(NamedTuple):
    """One collective: its name, the bytes of the whole tensor, and which processes take part.

    Bytes of all_gather are those of its result, of reduce_scatter those of its input, of all_to_all
    the most that one process sends or receives.
    """

    kind: Kind
    n_bytes: int
    over: Over = "all"


def sent_bytes(call: Call, placement: Placement) -> float:
    """What a GPU sends on average, by the best algorithm (a ring)."""
    n = placement.ranks(call.over)
    if n == 1:
        return 0.0
    rounds = 2 if call.kind == "all_reduce" else 1
    return call.n_bytes * rounds * (n - 1) / n


# -- DoPr


class Refresh(NamedTuple):
    """The collectives of a refresh, in their order."""

    token_counts_and_traces: Call  # tokens and mean eigenvalues
    sums: list[tuple[Call, list[Layer]]]  # packed Σ z zᵀ, message by message
    outcome: Call  # which inverses failed
    made: list[Call]  # P, damping and U, from their owners
    norms: list[Call]  # ‖M‖ and ‖G‖ of spread rows

    @property
    def calls(self) -> list[Call]:
        return [
            self.token_counts_and_traces,
            *(call for call, _ in self.sums),
            self.outcome,
            *self.made,
            *self.norms,
        ]


@lru_cache
def owned(shape: Shape, mode: Mode, size: int) -> dict[int, list[Layer]]:
    """The layers whose P each process makes, of those that make any."""
    held: dict[int, list[Layer]] = {}
    for layer, rank in owners_of(layers(shape, mode), size).items():
        held.setdefault(rank, []).append(layer)
    return dict(sorted(held.items()))


def refresh_calls(shape: Shape, mode: Mode, placement: Placement) -> Refresh | None:
    """optim/dopr/refresh.py, optim/dopr/distributed.py, optim/dopr/refresh.py; None: one process sends nothing."""
    covered, n = layers(shape, mode), len(layers(shape, mode))
    if placement.size == 1:
        return None
    sums = [(Call("all_reduce", packed_bytes(some)), some) for some in messages(covered)]
    made = [
        Call("broadcast", FP32 * sum(sum(sent_sizes(layer)) for layer in message))
        for own in owned(shape, mode, placement.size).values()
        for message in messages(own)
    ]
    norms = [Call("all_reduce", n * 2 * FP32)] if placement.shards > 1 else []
    token_counts_and_traces, outcome = (
        Call("all_reduce", n * 2 * FP64),
        Call("all_reduce", n * 3 * FP64),
    )
    return Refresh(token_counts_and_traces, sums, outcome, made, norms)


def packed_bytes(covered: Iterable[Layer]) -> int:
    return sum(packed_numel(each.sigma.shape) * each.sigma.element_size() for each in covered)


# -- the base optimizer


def muon_calls(shape: Shape, placement: Placement) -> list[Call]:
    """optim/matrices.py: gathered from owners, or rows to the owners and back; of every group."""
    size = placement.owners
    if size == 1:
        return []
    calls = []
    for shapes, _ in matrices(shape):
        most = max(numel for numel in owned_numel(tuple(shapes), size).values())
        if placement.shards == 1:
            calls.append(Call("all_gather", FP32 * size * most))
        else:
            here = sum(-(-rows // size) * columns for rows, columns in shapes)
            calls += 2 * [Call("all_to_all", FP32 * max(most, here), "shard")]
    return calls


@lru_cache
def owned_numel(shapes: tuple[tuple[int, int], ...], size: int) -> dict[int, int]:
    """Elements of the matrices that each process orthogonalises, of those that have any."""
    held: dict[int, int] = {}
    for (rows, columns), rank in zip(shapes, owners_of_matrices(list(shapes), size), strict=True):
        held[rank] = held.get(rank, 0) + rows * columns
    return held


# -- forward and backward


def unit_bytes(params: list[Tensor], shards: int) -> int:
    """Of parameters that FSDP2 gathers together: fp32, the rows of each padded to a multiple."""
    padded = (shards * -(-p.shape[0] // shards) * p[0].numel() for p in params)
    return FP32 * sum(padded)


def micro_batch_calls(shape: Shape, placement: Placement) -> list[Call]:
    """FSDP2: blocks are gathered for the forward and again for the backward, the rest once."""
    if placement.shards == 1:
        return []
    blocks, rest = units(shape)
    calls = [Call("all_gather", unit_bytes(rest, placement.shards), "shard")]
    for block in blocks:
        calls += 2 * [Call("all_gather", unit_bytes(block, placement.shards), "shard")]
    return calls + [
        Call("reduce_scatter", unit_bytes(unit, placement.shards), "shard")
        for unit in (*blocks, rest)
    ]


def gradient_calls(shape: Shape, placement: Placement) -> list[Call]:
    """Once a step, in the last backward: gradients averaged over copies of the weights."""
    if placement.copies == 1:
        return []
    if placement.shards == 1:
        return [Call("all_reduce", n_bytes) for n_bytes in buckets(gpt(shape).parameters())]
    blocks, rest = units(shape)
    parts = (unit_bytes(unit, placement.shards) // placement.shards for unit in (*blocks, rest))
    return [Call("all_reduce", n_bytes, "replicate") for n_bytes in parts]


def buckets(parameters: Iterable[Tensor]) -> list[int]:
    """Bytes of each bucket of DDP: gradients come from the end, a full bucket has its limit."""
    result, limit = [0], FIRST_BUCKET
    for param in reversed(list(parameters)):
        if result[-1] >= limit:
            result.append(0)
            limit = BUCKET
        result[-1] += FP32 * param.numel()
    return result
