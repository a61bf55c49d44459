"""Estimate the peak memory of a GPU in bytes: in the backward, or in the optimizer step if higher.

Activation checkpointing is not modelled, because train.py has none. A compiled transformer block is
assumed to cast its weights again in the backward, so only one block has bf16 copies.
"""

from functools import lru_cache

from bench.scale.base_plan import owned_numel, unit_bytes
from bench.scale.calls import FP32, Placement
from bench.scale.plan import (
    busiest,
    exchange_chunks,
    layers_by_owner,
    local_rows,
    packed_bytes,
    placed_layers,
)
from bench.scale.shapes import DoprMode, ModelShape, matrices, n_weights, units
from bench.scale.work import Batch
from optim.dopr.layer import Layer
from optim.dopr.refresh import CHUNK_BYTES
from optim.matrices import MESSAGE_BYTES

# Bytes per token, layer and feature: Korthikanti et al. 2022, without attention maps.
ACTIVATIONS = 34
# Bytes per token and vocabulary entry: logits in bf16 and fp32, and an fp32 gradient; assumed.
LOGITS = 10
WORKSPACE = 9  # peak bytes of an inversion, in multiples of the bytes of Σ; see docs/dopr.md


def base_bytes(
    shape: ModelShape, placement: Placement, base: str, batch: Batch
) -> dict[str, float]:
    """Return the bytes of a step without DoPr, by purpose."""
    n_all = n_weights(shape)
    n_matrix = sum(rows * columns for shapes, _ in matrices(shape) for rows, columns in shapes)
    n_state = 2 * n_all - (n_matrix if base == "muon" else 0)  # Muon: one momentum, AdamW: two
    transformer_blocks, rest = units(shape)
    block_bytes = unit_bytes(transformer_blocks[0], placement.shards)
    gathered = unit_bytes(rest, placement.shards) + 2 * block_bytes
    if placement.shards == 1:
        gathered = block_bytes // 2  # bf16 copies
    features = ACTIVATIONS * shape.n_layer * shape.n_embd + LOGITS * shape.vocab_size
    return {
        "weights, gradients, state": FP32 * (2 * n_all + n_state) / placement.shards,
        "activations": batch.micro_tokens * features,
        "gathered weights": gathered,
        "Muon's matrices": muon_bytes(shape, placement) if base == "muon" else 0.0,
    }


def muon_bytes(shape: ModelShape, placement: Placement) -> float:
    """Return the peak bytes of optim/matrices.py over Muon's param groups.

    Under DDP a GPU holds its own results, all results, and what one message sends and receives.
    With sharded weights it holds four copies of the matrices that it owns and three of its rows of
    all matrices.
    """
    peak, size = 0.0, placement.owners
    for shapes, _ in matrices(shape):
        largest = max(owned_numel(tuple(shapes), size).values())
        total = sum(rows * columns for rows, columns in shapes)
        if size == 1:
            numel = 2 * total
        elif placement.shards == 1:
            per_process = min(largest, MESSAGE_BYTES // (FP32 * size))
            numel = largest + total + (size + 1) * per_process
        else:
            numel = 4 * largest + 3 * total / size
        peak = max(peak, FP32 * numel)
    return peak


@lru_cache
def dopr_bytes(shape: ModelShape, mode: DoprMode, placement: Placement) -> dict[str, float]:
    """Return the bytes that DoPr holds between steps, and those that parts of a step add.

    Each number is that of the process that needs the most.
    """
    ranks = layers_by_owner(shape, mode, placement)
    return {
        "Σ, sums, P, U, μ": max(held_bytes(shape, mode, placement, rank) for rank in ranks),
        "new sums": max(new_sum_bytes(shape, mode, placement, rank) for rank in ranks),
        "backward": reduction_bytes(shape, mode, placement),
        "refresh": max(refresh_bytes(shape, mode, placement, owned) for owned in ranks.values()),
        "exchange": exchange_bytes(shape, mode, placement),
    }


def held_bytes(shape: ModelShape, mode: DoprMode, placement: Placement, rank: int) -> int:
    """Return the most bytes of statistics between two steps. Every process holds all means."""
    placed = placed_layers(shape, mode, placement)
    means = sum(map(mean_bytes, placed))
    own = placed
    if placement.shares_statistics:
        own = layers_by_owner(shape, mode, placement).get(rank, [])
    kept = sum(layer.n_bytes - mean_bytes(layer) for layer in own)
    return means + kept - new_sum_bytes(shape, mode, placement, rank)


def new_sum_bytes(shape: ModelShape, mode: DoprMode, placement: Placement, rank: int) -> int:
    """Return the bytes of the sums of z zᵀ that live only within steps that refresh.

    A refresh frees the sums of an owner, and the next backward that collects allocates them. Sums
    that other steps collect, too, are kept between steps.
    """
    if not placement.shares_statistics or mode.collect_every < mode.refresh_every:
        return 0
    own = layers_by_owner(shape, mode, placement).get(rank, [])
    return sum(layer.capture.gram.nbytes for layer in own)


def mean_bytes(layer: Layer) -> int:
    """Return the bytes of μ and of the sums of z."""
    sums = layer.capture.column_sums
    return layer.mean.nbytes + (0 if sums is None else sums.nbytes)


def reduction_bytes(shape: ModelShape, mode: DoprMode, placement: Placement) -> int:
    """Return the bytes of the widest layer's sum of z zᵀ on its way to its owner (reduction.py).

    Beside the sum that it formed, a process holds the packed sum of another layer, and unpacks it.
    To form a sum takes less with the Triton kernel, and to pack it, too.
    """
    if not placement.shares_statistics:
        return 0
    placed = placed_layers(shape, mode, placement)
    return max(packed_bytes([layer]) + 2 * layer.sigma.nbytes for layer in placed)


def refresh_bytes(
    shape: ModelShape, mode: DoprMode, placement: Placement, owned: list[Layer]
) -> int:
    """Return the bytes that a refresh adds: a second P of each layer, messages, an inversion.

    With sharded statistics, a process has the P and, with HSDP, the messages of its own layers.
    """
    shared = placement.shares_statistics
    held = owned if shared else placed_layers(shape, mode, placement)
    n_messages = placement.copies > 1 if shared else 2 * (placement.size > 1)  # sums, and P if sent
    own_bytes = [layer.sigma.nbytes for layer in owned]
    chunk = max(*own_bytes, min(sum(own_bytes), CHUNK_BYTES))
    second_P = sum(layer.sigma.nbytes for layer in held)
    return second_P + n_messages * packed_bytes(held) + WORKSPACE * chunk


def exchange_bytes(shape: ModelShape, mode: DoprMode, placement: Placement) -> float:
    """Return the peak bytes of `Rows.apply` in optim/matrices.py for the largest chunk.

    The owner holds its whole gradients as received and put together, their products, and the same
    as sent; every process holds its rows.
    """
    peak = 0.0
    for chunk in exchange_chunks(shape, mode, placement):
        owned = busiest(chunk, lambda layer: layer.covered.weight.numel())
        rows = sum(local_rows(layer, placement) * layer.covered.d_in for layer in chunk)
        peak = max(peak, FP32 * (4 * owned + rows))
    return peak


def peaks(base: dict[str, float], dopr: dict[str, float], n_micro: int) -> tuple[float, float]:
    """Return the peak bytes without and with DoPr, for `n_micro` micro-batches per step.

    The activations are freed before the optimizer steps.
    """
    always, activations = base["weights, gradients, state"], base["activations"]
    gathered, new_sums = base["gathered weights"], dopr["new sums"]
    # A first backward frees activations while the sums grow, so it never holds all of both if the
    # owner's layers are spread over the depth. Later micro-batches find the sums there.
    both = max(activations, new_sums) if n_micro == 1 else activations + new_sums
    backward = gathered + both + dopr["backward"]
    own_step = max(new_sums + dopr["refresh"], dopr["exchange"])
    step = base["Muon's matrices"]
    kept = dopr["Σ, sums, P, U, μ"]
    return always + max(gathered + activations, step), always + kept + max(backward, step, own_step)
