"""List every collective of an optimizer step, with its bytes, as the code calls it.

tests/bench/scale/test_plan.py counts the collectives of real runs with two to four processes.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Literal, NamedTuple

from torch import Tensor

from bench.scale.shapes import DoprMode, ModelShape, gpt, layers, matrices, units
from optim.dopr.distributed import messages, owners_of, packed_numel, sent_sizes
from optim.dopr.layer import Layer
from optim.matrices import owners_of as matrix_owners

Kind = Literal["all_reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all"]
Over = Literal["all", "shard", "replicate"]
FP32, FP64 = 4, 8  # bytes
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes; the defaults of DistributedDataParallel


class Placement(NamedTuple):
    """How `trainer.parallel.Parallel` distributes a model over GPUs."""

    parallel: str  # ddp, fsdp or hsdp
    size: int  # GPUs
    shard_size: int = 8  # GPUs that hold one copy of the weights with hsdp

    @property
    def shards(self) -> int:
        """The number of GPUs that hold one copy of the weights."""
        return {"ddp": 1, "fsdp": self.size, "hsdp": self.shard_size}[self.parallel]

    @property
    def copies(self) -> int:
        """The number of copies of the weights."""
        return self.size // self.shards

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
    """Return the mean bytes that a GPU sends with the best algorithm, a ring."""
    n = placement.ranks(call.over)
    if n == 1:
        return 0.0
    rounds = 2 if call.kind == "all_reduce" else 1
    return call.n_bytes * rounds * (n - 1) / n


# -- DoPr


class RefreshCalls(NamedTuple):
    """The collectives of a refresh, in their order."""

    counts_and_traces: CollectiveCall  # token counts, and mean eigenvalues of the sums
    sums: list[tuple[CollectiveCall, list[Layer]]]  # packed sums of z zᵀ, and their layers
    failures: CollectiveCall  # which inversions failed
    inverses: list[CollectiveCall]  # P, damping and U, from the processes that computed them
    norms: list[CollectiveCall]  # ‖M‖ and ‖G‖, if their rows are sharded

    @property
    def calls(self) -> list[CollectiveCall]:
        sums = [call for call, _ in self.sums]
        return [self.counts_and_traces, *sums, self.failures, *self.inverses, *self.norms]


@lru_cache
def layers_by_owner(shape: ModelShape, mode: DoprMode, size: int) -> dict[int, list[Layer]]:
    """Return the layers whose P each process computes. Processes without layers are left out."""
    by_rank: dict[int, list[Layer]] = {}
    for layer, rank in owners_of(layers(shape, mode), size).items():
        by_rank.setdefault(rank, []).append(layer)
    return dict(sorted(by_rank.items()))


def refresh_calls(shape: ModelShape, mode: DoprMode, placement: Placement) -> RefreshCalls | None:
    """Return the collectives of optim/dopr/refresh.py, or None for a single process."""
    covered = layers(shape, mode)
    n = len(covered)
    if placement.size == 1:
        return None
    return RefreshCalls(
        counts_and_traces=CollectiveCall("all_reduce", n * 2 * FP64),
        sums=[
            (CollectiveCall("all_reduce", packed_bytes(message)), message)
            for message in messages(covered)
        ],
        failures=CollectiveCall("all_reduce", n * 3 * FP64),
        inverses=[
            CollectiveCall("broadcast", FP32 * sum(sum(sent_sizes(layer)) for layer in message))
            for owned in layers_by_owner(shape, mode, placement.size).values()
            for message in messages(owned)
        ],
        norms=[CollectiveCall("all_reduce", n * 2 * FP32)] if placement.shards > 1 else [],
    )


def mean_calls(
    shape: ModelShape, mode: DoprMode, placement: Placement, *, is_due: bool
) -> list[CollectiveCall]:
    """Return the collective of `update_means`, for a step with a refresh (`is_due`) or without one.

    Each layer sends Σ z and the number of tokens of the step. If it is due, it also sends those of
    the tokens in its Σ. Without `fresh_mean`, nothing is sent.
    """
    sums = [layer.capture.column_sums for layer in layers(shape, mode)]  # (2, d + 1) each
    n_bytes = sum(each[: 1 + is_due].nbytes for each in sums if each is not None)
    return [CollectiveCall("all_reduce", n_bytes)] if n_bytes and placement.size > 1 else []


def packed_bytes(covered: Iterable[Layer]) -> int:
    """Return the bytes of one triangle of each Σ."""
    return sum(packed_numel(layer.sigma.shape) * layer.sigma.element_size() for layer in covered)


# -- The base optimizer


def muon_calls(shape: ModelShape, placement: Placement) -> list[CollectiveCall]:
    """Return the collectives of optim/matrices.py for every param group.

    Under DDP the owners' results are gathered. With sharded weights, the rows of the matrices are
    sent to their owners, and the rows of the results are sent back.
    """
    size = placement.owners
    if size == 1:
        return []
    calls = []
    for shapes, _ in matrices(shape):
        largest = max(owned_numel(tuple(shapes), size).values())
        if placement.shards == 1:
            calls.append(CollectiveCall("all_gather", FP32 * size * largest))
        else:
            local_numel = sum(-(-rows // size) * columns for rows, columns in shapes)
            n_bytes = FP32 * max(largest, local_numel)
            calls += 2 * [CollectiveCall("all_to_all", n_bytes, "shard")]
    return calls


@lru_cache
def owned_numel(shapes: tuple[tuple[int, int], ...], size: int) -> dict[int, int]:
    """Return the number of matrix elements that each process orthogonalizes.

    Processes without matrices are left out.
    """
    numel: dict[int, int] = {}
    for (rows, columns), rank in zip(shapes, matrix_owners(list(shapes), size), strict=True):
        numel[rank] = numel.get(rank, 0) + rows * columns
    return numel


# -- Forward and backward


def unit_bytes(params: list[Tensor], shards: int) -> int:
    """Return the fp32 bytes of parameters that FSDP2 gathers together.

    The rows of each parameter are padded to a multiple of `shards`.
    """
    padded = (shards * -(-p.shape[0] // shards) * p[0].numel() for p in params)
    return FP32 * sum(padded)


def micro_batch_calls(shape: ModelShape, placement: Placement) -> list[CollectiveCall]:
    """Return the collectives of FSDP2 for one micro-batch.

    Each transformer block is gathered for the forward and again for the backward; the other weights
    are gathered once.
    """
    if placement.shards == 1:
        return []
    transformer_blocks, rest = units(shape)
    calls = [CollectiveCall("all_gather", unit_bytes(rest, placement.shards), "shard")]
    for block in transformer_blocks:
        n_bytes = unit_bytes(block, placement.shards)
        calls += 2 * [CollectiveCall("all_gather", n_bytes, "shard")]
    return calls + [
        CollectiveCall("reduce_scatter", unit_bytes(unit, placement.shards), "shard")
        for unit in (*transformer_blocks, rest)
    ]


def gradient_calls(shape: ModelShape, placement: Placement) -> list[CollectiveCall]:
    """Return the collectives that average gradients over copies of the weights, once per step."""
    if placement.copies == 1:
        return []
    if placement.shards == 1:
        buckets = bucket_bytes(gpt(shape).parameters())
        return [CollectiveCall("all_reduce", n_bytes) for n_bytes in buckets]
    transformer_blocks, rest = units(shape)
    return [
        CollectiveCall(
            "all_reduce", unit_bytes(unit, placement.shards) // placement.shards, "replicate"
        )
        for unit in (*transformer_blocks, rest)
    ]


def bucket_bytes(parameters: Iterable[Tensor]) -> list[int]:
    """Return the bytes of each gradient bucket of DDP, from the last parameter to the first.

    A bucket is closed once it has reached its limit.
    """
    buckets, limit = [0], FIRST_BUCKET
    for param in reversed(list(parameters)):
        if buckets[-1] >= limit:
            buckets.append(0)
            limit = BUCKET
        buckets[-1] += FP32 * param.numel()
    return buckets
