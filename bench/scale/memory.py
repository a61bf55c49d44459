"""What a GPU holds at most, in bytes: in the backward, or while P is made, if that is more.

Without activation checkpointing, which train.py has not. A compiled block casts its weights again
in the backward (assumed), so bf16 copies are those of one block.
"""

from __future__ import annotations

from bench.scale.plan import FP32, Placement, owned, owned_numel, packed_bytes, unit_bytes
from bench.scale.shapes import Mode, Shape, layers, matrices, n_weights, units
from bench.scale.work import Batch
from optim.dopr.refresh import CHUNK_BYTES

ACTIVATIONS = (
    34  # bytes a token, layer and feature: Korthikanti et al. 2022, without attention maps
)
LOGITS = 10  # bytes a token and word: bf16, fp32, and the gradient of fp32's; assumed
WORKSPACE = 9  # times the Σ that are inverted together, at most: README


def base_bytes(shape: Shape, placement: Placement, base: str, batch: Batch) -> dict[str, float]:
    """Weights, gradients and state; activations; what is gathered."""
    n_all = n_weights(shape)
    n_matrix = sum(rows * columns for shapes, _ in matrices(shape) for rows, columns in shapes)
    state = 2 * n_all - (n_matrix if base == "muon" else 0)  # one momentum, or Adam's two
    blocks, rest = units(shape)
    gathered = unit_bytes(rest, placement.shards) + 2 * unit_bytes(blocks[0], placement.shards)
    if placement.shards == 1:
        gathered = unit_bytes(blocks[0], 1) // 2  # bf16 copies
    features = ACTIVATIONS * shape.n_layer * shape.n_embd + LOGITS * shape.vocab_size
    return {
        "weights, gradients, state": FP32 * (2 * n_all + state) / placement.shards,
        "activations": batch.micro_tokens * features,
        "gathered weights": gathered,
        "Muon's matrices": muon_bytes(shape, placement) if base == "muon" else 0.0,
    }


def muon_bytes(shape: Shape, placement: Placement) -> float:
    """optim/matrices.py: under DDP the gathered results, as many buffers as GPUs; else an owner's
    matrices before and after, and the rows of all that are here."""
    most, size = 0.0, placement.owners
    for shapes, _ in matrices(shape):
        largest = max(owned_numel(tuple(shapes), size).values())
        everything = sum(rows * columns for rows, columns in shapes)
        if placement.shards == 1:
            held = (size + 1) * largest if size > 1 else 2 * everything
        else:
            held = 4 * largest + 3 * everything / size
        most = max(most, FP32 * held)
    return most


def dopr_bytes(shape: Shape, mode: Mode, placement: Placement) -> dict[str, float]:
    """What stays from step to step (Σ, its running sum, P, U), and what a refresh takes besides."""
    covered = layers(shape, mode)
    sigma = sum(layer.sigma.nbytes for layer in covered)
    largest = max(layer.sigma.nbytes for layer in covered)
    messages = 2 * packed_bytes(covered) if placement.size > 1 else 0  # sums, and P on its way
    own = max(
        sum(layer.sigma.nbytes for layer in held)
        for held in owned(shape, mode, placement.size).values()
    )
    chunk = max(largest, min(own, CHUNK_BYTES))
    return {
        "Σ, sums, P, U": sum(layer.n_bytes for layer in covered),
        "refresh": sigma + messages + WORKSPACE * chunk,  # a second P of every layer
    }


def peaks(base: dict[str, float], dopr: dict[str, float]) -> tuple[float, float]:
    """The most bytes without and with DoPr. Activations are gone when the optimizer steps."""
    always = base["weights, gradients, state"]
    backward = always + base["activations"] + base["gathered weights"]
    step = always + base["Muon's matrices"]
    kept = dopr["Σ, sums, P, U"]
    with_dopr = max(backward + kept, step + kept, always + kept + dopr["refresh"])
    return max(backward, step), with_dopr
