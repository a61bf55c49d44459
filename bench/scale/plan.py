"""List every collective that DoPr adds to a step, with its bytes, as the code calls it.

tests/bench/scale/test_plan.py counts the collectives of real runs with two to four processes.
"""

from collections.abc import Callable, Iterable
from copy import copy
from functools import lru_cache
from typing import NamedTuple

from bench.scale.calls import FP32, FP64, CollectiveCall, Placement, n_rows, rows_call
from bench.scale.shapes import DoprMode, ModelShape, layers
from optim.dopr.distributed import messages, sent_sizes
from optim.dopr.exchange import exchange_chunks as exchange_chunks_of
from optim.dopr.layer import Layer
from optim.dopr.ownership import layer_owners
from optim.dopr.triangles import packed_numel


@lru_cache
def placed_layers(shape: ModelShape, mode: DoprMode, placement: Placement) -> list[Layer]:
    """Return the layers that DoPr covers, with their owners if statistics are sharded."""
    placed = [copy(layer) for layer in layers(shape, mode)]
    if placement.shares_statistics:
        for layer, rank in layer_owners(placed, placement.shards).items():
            layer.owner = rank
    return placed


@lru_cache
def layers_by_owner(
    shape: ModelShape, mode: DoprMode, placement: Placement
) -> dict[int, list[Layer]]:
    """Return the layers whose P each process computes. Processes without layers are left out."""
    by_rank: dict[int, list[Layer]] = {}
    placed = placed_layers(shape, mode, placement)
    for layer, rank in layer_owners(placed, placement.inverters).items():
        by_rank.setdefault(rank, []).append(layer)
    return dict(sorted(by_rank.items()))


def reduce_calls(shape: ModelShape, mode: DoprMode, placement: Placement) -> list[CollectiveCall]:
    """Return the collectives of optim/dopr/reduction.py for a micro-batch that adds to Σ."""
    if not placement.shares_statistics:
        return []
    return [
        CollectiveCall("reduce", packed_bytes([layer]), "shard")
        for layer in placed_layers(shape, mode, placement)
    ]


def step_calls(
    shape: ModelShape, mode: DoprMode, placement: Placement, *, is_due: bool, rank: int
) -> list[CollectiveCall]:
    """Return DoPr's collectives before the base optimizer, in their order.

    Args:
        is_due: whether the step refreshes P.
        rank: of the process among those that hold one copy of the weights.
    """
    refresh = refresh_calls(shape, mode, placement, rank) if is_due else None
    return [
        *(refresh.calls[:1] if refresh else []),
        *mean_calls(shape, mode, placement, is_due=is_due),
        *(refresh.calls[1:] if refresh else []),
        *exchange_calls(shape, mode, placement, rank),
        *(norm_calls(shape, mode, placement) if is_due else []),
    ]


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


class RefreshCalls(NamedTuple):
    """The collectives of a refresh, in their order."""

    counts_and_traces: CollectiveCall  # token counts and mean eigenvalues of sums, and two flags
    sums: list[tuple[CollectiveCall, list[Layer]]]  # packed sums of z zᵀ, and their layers
    flags: CollectiveCall  # the mean eigenvalue of each layer, and whether its inversion failed
    inverses: list[CollectiveCall]  # P, damping and U, from the processes that computed them

    @property
    def calls(self) -> list[CollectiveCall]:
        sums = [call for call, _ in self.sums]
        return [self.counts_and_traces, *sums, self.flags, *self.inverses]


def refresh_calls(
    shape: ModelShape, mode: DoprMode, placement: Placement, rank: int
) -> RefreshCalls | None:
    """Return the collectives of optim/dopr/refresh.py, or None for a single process.

    With sharded statistics, an owner, here `rank`, adds up the sums of all copies (HSDP) for its
    own layers, and sends no P.
    """
    if placement.size == 1:
        return None
    by_owner = layers_by_owner(shape, mode, placement)
    summed, over, flags_over, sent = placed_layers(shape, mode, placement), "all", "all", by_owner
    if placement.shares_statistics:
        summed, over, flags_over, sent = by_owner.get(rank, []), "replicate", "shard", {}
    n = len(layers(shape, mode))
    return RefreshCalls(
        counts_and_traces=CollectiveCall("all_reduce", (n + 1) * 2 * FP64),
        sums=[
            (CollectiveCall("all_reduce", packed_bytes(message), over), message)
            for message in messages(summed)
            if placement.ranks(over) > 1
        ],
        flags=CollectiveCall("all_reduce", n * 4 * FP64, flags_over),
        inverses=[
            CollectiveCall("broadcast", FP32 * sum(sum(sent_sizes(layer)) for layer in message))
            for owned in sent.values()
            for message in messages(owned)
        ],
    )


def exchange_chunks(shape: ModelShape, mode: DoprMode, placement: Placement) -> list[list[Layer]]:
    """Return the layers whose rows travel together to their owners (optim/dopr/exchange.py)."""
    if not placement.shares_statistics:
        return []
    return [*exchange_chunks_of({x: x.owner for x in placed_layers(shape, mode, placement)})]


def busiest(chunk: Iterable[Layer], cost: Callable[[Layer], float]) -> float:
    """Return the cost of the layers of one owner, the one for which it is the highest."""
    costs: dict[int | None, float] = {}
    for layer in chunk:
        costs[layer.owner] = costs.get(layer.owner, 0) + cost(layer)
    return max(costs.values())


def local_rows(layer: Layer, placement: Placement) -> int:
    """Return the rows of a layer's weight in the first process, which no process exceeds."""
    return n_rows(layer.covered.weight.shape[0], placement.shards, 0)


def exchange_calls(
    shape: ModelShape, mode: DoprMode, placement: Placement, rank: int | None = None
) -> list[CollectiveCall]:
    """Return the collectives that take the rows of G to their owners, and bring back those of M."""
    calls = []
    for chunk in exchange_chunks(shape, mode, placement):
        owner = [0 if layer.owner is None else layer.owner for layer in chunk]
        shapes = [tuple(layer.covered.weight.shape) for layer in chunk]
        calls += 2 * [rows_call(shapes, owner, placement, rank)]
    return calls


def norm_calls(shape: ModelShape, mode: DoprMode, placement: Placement) -> list[CollectiveCall]:
    """Return the collective that adds up ‖M‖² and ‖G‖² of sharded rows after a refresh."""
    n_bytes = len(layers(shape, mode)) * 2 * FP32
    return [CollectiveCall("all_reduce", n_bytes)] if placement.shards > 1 else []


def packed_bytes(covered: Iterable[Layer]) -> int:
    """Return the bytes of each Σ when packed, little more than one triangle."""
    return sum(packed_numel(layer.shape) * layer.sigma.element_size() for layer in covered)
