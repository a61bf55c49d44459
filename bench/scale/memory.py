"""Estimate the peak memory of a GPU in bytes: in the backward, or in the optimizer step if higher.

Activation checkpointing is not modelled, because train.py has none. A compiled transformer block is
assumed to cast its weights again in the backward, so only one block has bf16 copies.
"""

from bench.scale.plan import (
    FP32,
    Placement,
    layers_by_owner,
    owned_numel,
    packed_bytes,
    unit_bytes,
)
from bench.scale.shapes import DoprMode, ModelShape, layers, matrices, n_weights, units
from bench.scale.work import Batch
from optim.dopr.refresh import CHUNK_BYTES

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

    Under DDP a GPU holds its own results and the gathered results, one buffer per GPU. With sharded
    weights it holds four copies of the matrices that it owns and three of its rows of all matrices.
    """
    peak, size = 0.0, placement.owners
    for shapes, _ in matrices(shape):
        largest = max(owned_numel(tuple(shapes), size).values())
        total = sum(rows * columns for rows, columns in shapes)
        if placement.shards == 1:
            numel = (size + 1) * largest if size > 1 else 2 * total
        else:
            numel = 4 * largest + 3 * total / size
        peak = max(peak, FP32 * numel)
    return peak


def dopr_bytes(shape: ModelShape, mode: DoprMode, placement: Placement) -> dict[str, float]:
    """Return the bytes that DoPr holds between steps, and those that a refresh adds."""
    covered = layers(shape, mode)
    sigma = sum(layer.sigma.nbytes for layer in covered)
    largest = max(layer.sigma.nbytes for layer in covered)
    messages = 2 * packed_bytes(covered) if placement.size > 1 else 0  # the sums, and sent P
    busiest = max(
        sum(layer.sigma.nbytes for layer in owned)
        for owned in layers_by_owner(shape, mode, placement.size).values()
    )
    chunk = max(largest, min(busiest, CHUNK_BYTES))
    return {
        "Σ, sums, P, U, μ": sum(layer.n_bytes for layer in covered),
        "refresh": sigma + messages + WORKSPACE * chunk,  # `sigma` is for a second P of each layer
    }


def peaks(base: dict[str, float], dopr: dict[str, float]) -> tuple[float, float]:
    """Return the peak bytes without and with DoPr.

    The activations are freed before the optimizer steps.
    """
    always = base["weights, gradients, state"]
    backward = always + base["activations"] + base["gathered weights"]
    step = always + base["Muon's matrices"]
    kept = dopr["Σ, sums, P, U, μ"]
    with_dopr = max(backward + kept, step + kept, always + kept + dopr["refresh"])
    return max(backward, step), with_dopr
