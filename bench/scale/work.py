"""Estimate the computation of a GPU in a step, in seconds.

The time of matrix products follows from their FLOPs, the time of everything else from its bytes.
"""

from math import ceil

from bench.scale.hardware import Hardware
from bench.scale.plan import Placement, layers_by_owner
from bench.scale.shapes import DoprMode, ModelShape, gpt, layers, matrices, n_weights
from optim.dopr.layer import Layer
from optim.dopr.statistics import condition_bound
from optim.kernels.cholesky import BF16X3_FLOOR, PLAIN_BF16X3_FLOOR, WANTED_ERROR
from optim.kernels.deflation import deflated_condition_bound
from optim.kernels.newton_schulz import newton_iterations
from optim.matrices import owners_of

NS_STEPS = 5  # of Muon
# Bytes of memory traffic, counted by reading the code.
PACK = 40  # per element of a packed triangle: read and written by index, with the indices made
SIGMA = 24  # per element of Σ: gram / count, the average, a cleared sum
CENTRED = 16  # per element of Σ with a fresh mean: μ μᵀ made, subtracted
APPLY_G = 24  # per element of G: stacked, multiplied, normed, written back
APPLY_P = 12  # per element of P: stacked
CORRECT_M = 12  # per element of M: M μ, and M updated in place
CORRECT_P = 4  # per element of P: P μ
# The same per element of z or grad_y, in bf16, in a backward on a GPU.
MASK_GRAD_Y = 4  # its largest and its smallest element
MASK_Z = 4  # a copy with zeros for masked tokens
SAMPLE = 4  # a copy of the sample
SUM_Z = 2  # read
ADAMW, MUON, CLIP = 28, 40, 12  # per weight: state, gradient and weight, read and written


class Batch:
    """The tokens of a step on one GPU, and their micro-batches.

    Each GPU gets at least `min_tokens`, so with many GPUs the batch grows with their number. A
    forward takes at most `max_micro_tokens`.
    """

    def __init__(
        self, shape: ModelShape, size: int, min_tokens: int, max_micro_tokens: int
    ) -> None:
        self.tokens = max(shape.batch_tokens / size, min_tokens, shape.block_size)
        self.n_micro = ceil(self.tokens / max_micro_tokens)
        self.max_micro_tokens = max_micro_tokens
        self.micro_tokens = self.tokens / self.n_micro


def forward_backward(shape: ModelShape, tokens: float, hardware: Hardware) -> float:
    return tokens * gpt(shape).flops_per_token() / (hardware.bf16 * hardware.mfu)


def update(shape: ModelShape, placement: Placement, base: str, hardware: Hardware) -> float:
    """Return the time of clipping and of the element-wise update of the base optimizer."""
    n_matrix = sum(rows * columns for shapes, _ in matrices(shape) for rows, columns in shapes)
    n_matrix = n_matrix if base == "muon" else 0
    n_bytes = CLIP * n_weights(shape) + MUON * n_matrix + ADAMW * (n_weights(shape) - n_matrix)
    return passes(n_bytes / placement.shards, hardware)


def orthogonalization(shape: ModelShape, placement: Placement, hardware: Hardware) -> float:
    """Return the time of Muon's Newton-Schulz in the busiest process.

    Symmetric products take half of the FLOPs.
    """
    size, flops = placement.owners, 0.0
    for shapes, qkv_blocks in matrices(shape):
        load = [0.0] * size
        for (rows, columns), rank in zip(shapes, owners_of(shapes, size), strict=True):
            m, n = sorted((rows // qkv_blocks, columns))
            load[rank] += qkv_blocks * NS_STEPS * (3 * m * m * n + m**3)
        flops += max(load)
    return flops / (hardware.bf16 * hardware.muon_fraction)


# -- DoPr


def statistics(
    shape: ModelShape, mode: DoprMode, batch: Batch, hardware: Hardware, *, is_collecting: bool
) -> float:
    """Return the time of the statistics in the backwards of a step, which may add to Σ or not."""
    n_bytes = batch.tokens * token_bytes(shape, mode, is_collecting=is_collecting)
    return passes(n_bytes, hardware) + is_collecting * gram(shape, mode, batch, hardware)


def token_bytes(shape: ModelShape, mode: DoprMode, *, is_collecting: bool) -> float:
    """Return the memory traffic of `accumulate_gram` for each token, without the sum of z zᵀ.

    It copies the sampled tokens, finds the masked ones and sets their z to zero. With `fresh_mean`
    it does so in every step, and sums z; where it collects, the kernel that sums z zᵀ does that.
    """
    if not (is_collecting or mode.fresh_mean):
        return 0.0
    d_in = sum(layer.covered.d_in for layer in layers(shape, mode))
    d_out = sum(layer.covered.weight.shape[0] for layer in layers(shape, mode))
    masking = MASK_Z * d_in + MASK_GRAD_Y * d_out
    sampling = SAMPLE * (d_in + d_out) * (mode.token_stride > 1)
    return (sampling + masking + SUM_Z * d_in * (not is_collecting)) / mode.token_stride


def gram(shape: ModelShape, mode: DoprMode, batch: Batch, hardware: Hardware) -> float:
    """Return the time to sum z zᵀ in a step that collects statistics.

    It is half of a matrix product, and a pass over Σ per micro-batch.
    """
    numel = sum(layer.sigma.numel() for layer in layers(shape, mode))
    flops = batch.tokens / mode.token_stride * numel  # a multiply and an add, of one triangle
    n_bytes = batch.n_micro * 2 * 4 * numel
    return flops / (hardware.bf16 * hardware.gram_fraction) + passes(n_bytes, hardware)


def apply(shape: ModelShape, mode: DoprMode, placement: Placement, hardware: Hardware) -> float:
    """Return the time of M = G P for the rows of one GPU, as three tf32 products."""
    flops = n_bytes = 0.0
    for layer in layers(shape, mode):
        rows = ceil(layer.covered.weight.shape[0] / placement.shards)
        flops += 2 * rows * layer.P.numel()
        n_bytes += APPLY_G * rows * layer.covered.d_in + APPLY_P * layer.P.numel()
    return flops / (hardware.tf32 / 3 * hardware.apply_fraction) + passes(n_bytes, hardware)


def correction(
    shape: ModelShape, mode: DoprMode, placement: Placement, hardware: Hardware
) -> float:
    """Return the time to correct the rows of M of one GPU for the mean, with `fresh_mean`."""
    n_bytes = 0.0
    for layer in layers(shape, mode):
        rows = ceil(layer.covered.weight.shape[0] / placement.shards)
        n_bytes += CORRECT_M * rows * layer.covered.d_in + CORRECT_P * layer.P.numel()
    return passes(n_bytes, hardware)


def inverse(chunk: list[Layer], mode: DoprMode, hardware: Hardware) -> float:
    """Return the time to compute P of layers that are inverted together."""
    return sum(_inverse(layer, mode, hardware) for layer in chunk) + 4 * hardware.host_read


def _inverse(layer: Layer, mode: DoprMode, hardware: Hardware) -> float:
    n_blocks, b, _ = layer.P.shape
    if mode.inverse == "cholesky":  # fp64; torch inverts by solving for the identity: b³/3 + 2 b³
        share = hardware.cholesky_fraction * b / (b + hardware.cholesky_half)
        return n_blocks * 7 / 3 * b**3 / (hardware.fp64 * share)
    bound = condition_bound(n_blocks * b, mode.gamma)
    bound = bound if layer.deflation_basis is None else deflated_condition_bound(bound)
    condition = bound + b**0.5
    floor = PLAIN_BF16X3_FLOOR if layer.deflation_basis is None else BF16X3_FLOOR
    rate = hardware.bf16 / 3 if condition * floor <= WANTED_ERROR else hardware.fp32
    flops = 2 * newton_iterations(condition, 1) * n_blocks * b**3  # two symmetric products each
    return flops / (rate * hardware.newton_fraction)


def repacking(shape: ModelShape, mode: DoprMode, placement: Placement, hardware: Hardware) -> float:
    """Return the time to pack and unpack triangles and to average Σ, in the busiest process."""
    numel = sum(layer.sigma.numel() for layer in layers(shape, mode))
    averaging = (SIGMA + CENTRED * mode.fresh_mean) * numel
    if placement.size == 1:
        return passes(averaging, hardware)
    owned_numel = max(  # of a process that unpacks its Σ once more and packs its P
        sum(layer.sigma.numel() for layer in owned)
        for owned in layers_by_owner(shape, mode, placement.size).values()
    )
    return passes(averaging + PACK / 2 * (3 * numel + 2 * owned_numel), hardware)


def passes(n_bytes: float, hardware: Hardware) -> float:
    """Return the time to read and write n_bytes of memory."""
    return n_bytes / (hardware.memory_rate * hardware.memory_fraction)
