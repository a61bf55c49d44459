"""List every collective of a step without DoPr, with its bytes, as the code calls it.

tests/bench/scale/test_plan.py counts the collectives of real runs with two to four processes.
"""

from collections.abc import Iterable
from functools import lru_cache

from torch import Tensor

from bench.scale.calls import FP32, CollectiveCall, Placement, rows_call
from bench.scale.shapes import ModelShape, gpt, matrices, units
from optim.matrices import MESSAGE_BYTES, matrix_owners

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes; the defaults of DistributedDataParallel

# -- Muon


def muon_calls(
    shape: ModelShape, placement: Placement, rank: int | None = None
) -> list[CollectiveCall]:
    """Return the collectives of optim/matrices.py for every param group.

    Under DDP the owners' results are gathered. With sharded weights, the rows of the matrices are
    sent to their owners, and the rows of the results are sent back.
    """
    size = placement.owners
    if size == 1:
        return []
    calls = []
    for shapes, _ in matrices(shape):
        if placement.shards == 1:
            calls += gather_calls(max(owned_numel(tuple(shapes), size).values()), size)
        else:
            calls += 2 * [rows_call(shapes, owners(tuple(shapes), size), placement, rank)]
    return calls


def gather_calls(largest: int, size: int) -> list[CollectiveCall]:
    """Return the messages of `Copies`: each process sends as many elements as the busiest one."""
    n = max(1, MESSAGE_BYTES // (FP32 * size))  # elements per process and message
    numels = [min(n, largest - first) for first in range(0, largest, n)]
    return [CollectiveCall("all_gather", FP32 * size * numel) for numel in numels]


@lru_cache
def owners(shapes: tuple[tuple[int, ...], ...], size: int) -> list[int]:
    return matrix_owners(list(shapes), size)


@lru_cache
def owned_numel(shapes: tuple[tuple[int, int], ...], size: int) -> dict[int, int]:
    """Return the number of matrix elements that each process orthogonalizes.

    Processes without matrices are left out.
    """
    numel: dict[int, int] = {}
    for (rows, columns), rank in zip(shapes, owners(shapes, size), strict=True):
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
