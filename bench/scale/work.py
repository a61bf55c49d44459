"""Estimate the computation of a GPU in a step, in seconds.

The time of matrix products follows from their FLOPs, the time of everything else from its bytes.
"""

from collections.abc import Callable, Iterable
from math import ceil

from bench.scale.base_plan import owners
from bench.scale.calls import Placement
from bench.scale.hardware import Hardware
from bench.scale.plan import busiest, exchange_chunks, layers_by_owner, local_rows, placed_layers
from bench.scale.shapes import DoprMode, ModelShape, gpt, layers, matrices, n_weights
from optim.dopr.layer import Layer
from optim.dopr.statistics import condition_bound
from optim.dopr.triangles import packed_numel
from optim.kernels.damped_root import BF16X3_FLOOR, PLAIN_BF16X3_FLOOR, WANTED_ERROR
from optim.kernels.deflation import deflated_condition_bound
from optim.kernels.newton_schulz import newton_iterations

NS_STEPS = 5  # of Muon
# Bytes of memory traffic, counted by reading the code.
PACK = 8  # per element of a packed triangle: read, written
JOIN = 8  # the same: joined with those of other layers for one message
UNPACK = 8  # per element of Σ: read from a packed triangle, written
CLEAR_SUM = 4  # per element of a sum of z zᵀ: set to zero
ADD_SUM = 12  # per element of a sum of z zᵀ that an owner received: added to the earlier ones
SIGMA = 20  # per element of Σ: gram / count, the average
CENTRED = 16  # per element of Σ with a fresh mean: μ μᵀ made, subtracted
APPLY_G = 24  # per element of G: stacked, multiplied, normed, written back
MOVE_G = 16  # per element of G that is sent or received: collected before and after
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
        for (rows, columns), rank in zip(shapes, owners(tuple(shapes), size), strict=True):
            m, n = sorted((rows // qkv_blocks, columns))
            load[rank] += qkv_blocks * NS_STEPS * (3 * m * m * n + m**3)
        flops += max(load)
    return flops / (hardware.bf16 * hardware.muon_fraction)


# -- DoPr


def statistics(
    shape: ModelShape,
    placement: Placement,
    mode: DoprMode,
    batch: Batch,
    hardware: Hardware,
    *,
    is_collecting: bool,
) -> float:
    """Return the time of the statistics in the backwards of a step, which may add to Σ or not."""
    n_bytes = batch.tokens * token_bytes(shape, mode, is_collecting=is_collecting)
    added = gram(shape, placement, mode, batch, hardware) if is_collecting else 0.0
    return passes(n_bytes, hardware) + added


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


def gram(
    shape: ModelShape, placement: Placement, mode: DoprMode, batch: Batch, hardware: Hardware
) -> float:
    """Return the time to sum z zᵀ in a step that collects statistics.

    It is half of a matrix product, and a pass over Σ per micro-batch. If the sum goes to an owner,
    it also starts from zero and is packed, and the owner unpacks it and, unless it is the first
    one since a refresh, adds it.
    """
    covered = layers(shape, mode)
    flops = batch.tokens / mode.token_stride * numel(covered)  # a multiply and an add, one triangle
    n_bytes = batch.n_micro * 2 * 4 * numel(covered)
    if placement.shares_statistics:
        own = numel(busiest_owned(shape, mode, placement))
        formed = CLEAR_SUM * numel(covered) + PACK * packed(covered)
        n_added = batch.n_micro - mode.collect_every / mode.refresh_every
        n_bytes += batch.n_micro * (formed + UNPACK * own) + n_added * ADD_SUM * own
    return flops / (hardware.bf16 * hardware.gram_fraction) + passes(n_bytes, hardware)


def busiest_owned(shape: ModelShape, mode: DoprMode, placement: Placement) -> list[Layer]:
    """Return the layers of the process that inverts the most elements of Σ."""
    return max(layers_by_owner(shape, mode, placement).values(), key=numel)


def numel(covered: Iterable[Layer]) -> int:
    """Return the elements of all Σ."""
    return sum(layer.sigma.numel() for layer in covered)


def packed(covered: Iterable[Layer]) -> int:
    """Return the elements of all Σ when packed."""
    return sum(packed_numel(layer.shape) for layer in covered)


def apply(shape: ModelShape, mode: DoprMode, placement: Placement, hardware: Hardware) -> float:
    """Return the time of M = G P, as three tf32 products: of local rows, or of whole G by owners.

    The owners' time is that of the busiest one in each chunk of layers.
    """

    def product(layer: Layer, rows: int) -> float:
        flops = 2 * rows * layer.P.numel()
        n_bytes = APPLY_G * rows * layer.covered.d_in + APPLY_P * layer.P.numel()
        return flops / (hardware.tf32 / 3 * hardware.apply_fraction) + passes(n_bytes, hardware)

    moved = 0.0
    for chunk in exchange_chunks(shape, mode, placement):
        moved += busiest(chunk, lambda layer: layer.covered.weight.numel())
        moved += sum(local_rows(layer, placement) * layer.covered.d_in for layer in chunk)
    return by_rows(shape, mode, placement, product) + passes(MOVE_G * moved, hardware)


def correction(
    shape: ModelShape, mode: DoprMode, placement: Placement, hardware: Hardware
) -> float:
    """Return the time to correct M for the mean, with `fresh_mean`, where M is computed."""

    def correct(layer: Layer, rows: int) -> float:
        n_bytes = CORRECT_M * rows * layer.covered.d_in + CORRECT_P * layer.P.numel()
        return passes(n_bytes, hardware)

    return by_rows(shape, mode, placement, correct)


def by_rows(
    shape: ModelShape,
    mode: DoprMode,
    placement: Placement,
    seconds_of: Callable[[Layer, int], float],  # of a layer and a number of rows of its G
) -> float:
    """Return the time for all layers: for the local rows, or for all rows by the owners."""
    if not placement.shares_statistics:
        covered = placed_layers(shape, mode, placement)
        return sum(seconds_of(layer, local_rows(layer, placement)) for layer in covered)
    return sum(
        busiest(chunk, lambda layer: seconds_of(layer, layer.covered.weight.shape[0]))
        for chunk in exchange_chunks(shape, mode, placement)
    )


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
    """Return the time of a refresh to average Σ, twice where P is computed, and to pack triangles.

    It is that of the busiest process. With replicated statistics, each process packs its sums and
    the P that it computed, unpacks the sums of all, its own twice, and every P, and clears its
    sums. With HSDP, an owner packs the sums of its own layers and unpacks them twice.
    """
    own, held = busiest_owned(shape, mode, placement), layers(shape, mode)
    if placement.shares_statistics:
        held = own
    n_bytes = (SIGMA + CENTRED * mode.fresh_mean) * (numel(held) + numel(own))
    if not placement.shares_statistics:
        n_bytes += CLEAR_SUM * numel(held)
        if placement.size > 1:
            n_bytes += (PACK + JOIN) * (packed(held) + packed(own))
            n_bytes += UNPACK * (2 * numel(held) + numel(own))
    elif placement.copies > 1:
        n_bytes += (PACK + JOIN) * packed(own) + UNPACK * 2 * numel(own)
    return passes(n_bytes, hardware)


def passes(n_bytes: float, hardware: Hardware) -> float:
    """Return the time to read and write n_bytes of memory."""
    return n_bytes / (hardware.memory_rate * hardware.memory_fraction)
