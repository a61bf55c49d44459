"""What a GPU computes in a step, in seconds: matrix products by operations, the rest by bytes."""

from __future__ import annotations

from math import ceil

from bench.scale.hardware import Hardware
from bench.scale.plan import Placement, owned
from bench.scale.shapes import Mode, Shape, gpt, layers, matrices, n_weights
from optim.dopr.layer import Layer, condition_bound
from optim.kernels.cholesky import BF16X3_FLOOR, PLAIN_BF16X3_FLOOR, WANTED_ERROR
from optim.kernels.deflation import deflated_condition_bound
from optim.kernels.newton_schulz import newton_iterations
from optim.matrices import owners_of

NS_STEPS = 5  # of Muon
# Bytes that pass through a GPU's memory, counted by reading the code.
PACK = 40  # an element of a packed triangle: read and written by index, the indices made
SIGMA = 24  # an element of Σ: gram / count, the average, a cleared sum
APPLY_G, APPLY_P = (
    24,
    12,
)  # an element of G: stacked, multiplied, normed, written back; of P: stacked
ADAMW, MUON, CLIP = 28, 40, 12  # a weight: state, gradient and weight, read and written


class Batch:
    """How the tokens of a step lie on the GPUs.

    Every GPU takes at least `least` tokens: from some number of GPUs on, the batch grows with them.
    A forward takes at most `micro_tokens`.
    """

    def __init__(self, shape: Shape, size: int, least: int, micro_tokens: int) -> None:
        whole = max(shape.batch_tokens / size, least, shape.block_size)
        self.n_micro = ceil(whole / micro_tokens)
        self.most = micro_tokens
        self.tokens = whole  # of a GPU in a step
        self.micro_tokens = whole / self.n_micro


def forward_backward(shape: Shape, tokens: float, hardware: Hardware) -> float:
    return tokens * gpt(shape).flops_per_token() / (hardware.bf16 * hardware.mfu)


def update(shape: Shape, placement: Placement, base: str, hardware: Hardware) -> float:
    """Clipping and the base optimizer's own passes over its state."""
    n_matrix = sum(rows * columns for shapes, _ in matrices(shape) for rows, columns in shapes)
    n_matrix = n_matrix if base == "muon" else 0
    n_bytes = CLIP * n_weights(shape) + MUON * n_matrix + ADAMW * (n_weights(shape) - n_matrix)
    return passes(n_bytes / placement.shards, hardware)


def orthogonalisation(shape: Shape, placement: Placement, hardware: Hardware) -> float:
    """Muon's Newton-Schulz, of the process that has most of it; symmetric products are halved."""
    size, longest = placement.owners, 0.0
    for shapes, blocks in matrices(shape):
        load = [0.0] * size
        for (rows, columns), rank in zip(shapes, owners_of(shapes, size), strict=True):
            m, n = sorted((rows // blocks, columns))
            load[rank] += blocks * NS_STEPS * (3 * m * m * n + m**3)
        longest += max(load)
    return longest / (hardware.bf16 * hardware.muon_fraction)


# -- DoPr


def gram(shape: Shape, mode: Mode, batch: Batch, hardware: Hardware) -> float:
    """Σ z zᵀ of a step that collects: half of a product, and a pass over Σ each micro-batch."""
    numel = sum(layer.sigma.numel() for layer in layers(shape, mode))
    flops = batch.tokens / mode.token_stride * numel  # a multiply and an add, of one triangle
    n_bytes = batch.n_micro * 2 * 4 * numel
    return flops / (hardware.bf16 * hardware.gram_fraction) + passes(n_bytes, hardware)


def apply(shape: Shape, mode: Mode, placement: Placement, hardware: Hardware) -> float:
    """M = G P of every step, of the rows that are here, in three tf32 products."""
    flops = n_bytes = 0.0
    for layer in layers(shape, mode):
        rows = ceil(layer.covered.weight.shape[0] / placement.shards)
        flops += 2 * rows * layer.P.numel()
        n_bytes += APPLY_G * rows * layer.covered.d_in + APPLY_P * layer.P.numel()
    return flops / (hardware.tf32 / 3 * hardware.apply_fraction) + passes(n_bytes, hardware)


def inverse(chunk: list[Layer], mode: Mode, hardware: Hardware) -> float:
    """P of layers that are inverted together."""
    return sum(_inverse(layer, mode, hardware) for layer in chunk) + 4 * hardware.host_read


def _inverse(layer: Layer, mode: Mode, hardware: Hardware) -> float:
    blocks, b, _ = layer.P.shape
    if mode.inverse == "cholesky":  # fp64; torch inverts by solving for the identity: b³/3 + 2 b³
        share = hardware.cholesky_fraction * b / (b + hardware.cholesky_half)
        return blocks * 7 / 3 * b**3 / (hardware.fp64 * share)
    bound = condition_bound(blocks * b, mode.gamma)
    bound = bound if layer.deflation_basis is None else deflated_condition_bound(bound)
    condition = bound + b**0.5
    floor = PLAIN_BF16X3_FLOOR if layer.deflation_basis is None else BF16X3_FLOOR
    rate = hardware.bf16 / 3 if condition * floor <= WANTED_ERROR else hardware.fp32
    flops = 2 * newton_iterations(condition, 1) * blocks * b**3  # two symmetric products each
    return flops / (rate * hardware.newton_fraction)


def repacking(shape: Shape, mode: Mode, placement: Placement, hardware: Hardware) -> float:
    """Around a refresh: triangles packed and unpacked, Σ averaged; of the busiest process."""
    numel = sum(layer.sigma.numel() for layer in layers(shape, mode))
    if placement.size == 1:
        return passes(SIGMA * numel, hardware)
    own = max(
        sum(layer.sigma.numel() for layer in held)
        for held in owned(shape, mode, placement.size).values()
    )  # its Σ is unpacked once more, its P packed
    return passes(SIGMA * numel + PACK / 2 * (3 * numel + 2 * own), hardware)


def passes(n_bytes: float, hardware: Hardware) -> float:
    """Reading and writing memory."""
    return n_bytes / (hardware.memory_rate * hardware.memory_fraction)
