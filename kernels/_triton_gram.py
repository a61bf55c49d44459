"""S <- β S + α Σ z zᵀ on the GPU: the lower triangle in tiles, the tokens in splits.

Each split of the sampled tokens sums its own copy of every lower tile; then each element has one
owner, which adds the copies in a fixed order, takes the moving average with the lower element of S,
and writes it to both sides of the diagonal. So it is bitwise reproducible and exactly symmetric,
and neither pass reads the upper triangle. Semantics: `kernels.gram.gram_`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_tiles import (
    Config,
    check_runs,
    lower_tile,
    multiply_add,
    n_lower_tiles,
    scalars,
)

PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "bf16", torch.float32: "tf32x3"}
CONFIGS = {
    "bf16": Config(tile=128, depth=64, num_warps=8, num_stages=3),
    "tf32x3": Config(tile=64, depth=32, num_warps=4, num_stages=3),
}
REDUCE_ROWS = 16  # of a tile, each added by a program of its own
PROGRAMS = 264  # to split the tokens for: two for every multiprocessor of an H100
SPLIT_ROWS = 512  # a split takes at least so many tokens


def gram_(
    S: Tensor,  # (blocks, b, b) fp32, updated in place
    z: Tensor,  # (..., T, blocks·b) bf16, fp16 or fp32, one row a token
    *,
    beta: float | Tensor = 1.0,
    alpha: float | Tensor = 1.0,
    stride: int = 1,
    offset: int | Tensor = 0,
    config: Config | None = None,
) -> int:  # count
    """S <- β S + α Σ z zᵀ over the sampled tokens, in place; returns how many these are.

    As `kernels.gram.gram_`, and S is symmetric before as after. `beta`, `alpha` and `offset` may be
    tensors on the device: nothing waits for it. Sums are fp32, products of fp32 inputs tf32x3.

    Raises ValueError for a dtype that it does not take, shapes that do not fit, or no GPU.
    """
    _check(S, z, stride)
    check_runs("gram_", z)
    rows = z.detach().reshape(-1, z.shape[-1])  # (B T, d)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    T = z.shape[-2]
    per_sequence = triton.cdiv(T, stride)
    n = per_sequence * z.shape[:-2].numel()
    if n == 0:
        S.mul_(beta)
        return 0
    precision = PRECISIONS[z.dtype]
    config = config or CONFIGS[precision]
    if isinstance(offset, Tensor):
        offset = offset.to(z.device, torch.int64)
    else:
        offset = torch.full((), offset, dtype=torch.int64, device=z.device)
    with torch.cuda.device_of(z):
        partial = _partials(rows, S.shape, (n, T, per_sequence, stride), offset, precision, config)
        _reduce(S, partial, scalars(beta, 1, S), scalars(alpha, 1, S), config)
    return n


def split_rows(n: int, programs: int, depth: int) -> int:
    """How many of n tokens a split takes: a multiple of `depth`, the same on every device."""
    splits = max(1, min(PROGRAMS // programs, n // SPLIT_ROWS))
    return triton.cdiv(triton.cdiv(n, splits), depth) * depth


def _partials(
    rows: Tensor,  # (B T, blocks·b)
    shape: torch.Size,  # (blocks, b, b)
    sampling: tuple[int, int, int, int],  # n, T, per_sequence, stride
    offset: Tensor,  # () int64
    precision: str,
    config: Config,
) -> Tensor:  # (splits, blocks, tiles, tile, tile)
    blocks, b, _ = shape
    tile, depth, num_warps, num_stages = config
    tiles = n_lower_tiles(b, tile)
    chunk = split_rows(sampling[0], tiles * blocks, depth)
    splits = triton.cdiv(sampling[0], chunk)
    partial = rows.new_empty((splits, blocks, tiles, tile, tile), dtype=torch.float32)
    partial_kernel[(tiles, blocks, splits)](
        *(rows, partial, offset, *sampling, chunk, rows.stride(0), b),
        **{"TILE": tile, "DEPTH": depth, "PRECISION": precision},
        **{"num_warps": num_warps, "num_stages": num_stages},
    )
    return partial


def _reduce(S: Tensor, partial: Tensor, beta: Tensor, alpha: Tensor, config: Config) -> None:
    splits, blocks, tiles, tile, _ = partial.shape
    rows = min(REDUCE_ROWS, tile)
    reduce_kernel[(tiles, blocks, tile // rows)](
        *(S, partial, beta, alpha, splits, S.shape[1], *S.stride()),
        **{"TILE": tile, "ROWS": rows, "num_warps": 4},
    )


@triton.jit
def partial_kernel(
    z_ptr,  # (B T, blocks·b), rows row_stride apart
    partial_ptr,  # (splits, blocks, tiles, TILE, TILE)
    offset_ptr,  # () int64
    n,  # sampled tokens
    T,  # tokens of a sequence
    per_sequence,  # sampled tokens of a sequence
    stride,
    chunk,  # sampled tokens of a split
    row_stride,
    b,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial[split, block, (i, j)] <- Σ z_i z_jᵀ over this split's tokens, i >= j."""
    tile, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i, j = lower_tile(tile)
    within = tl.arange(0, TILE)
    column_i, column_j = i * TILE + within, j * TILE + within
    first = tl.load(offset_ptr) % T
    first = tl.where(first < 0, first + T, first).to(tl.int32)
    z_ptr += block * b
    acc = tl.zeros((TILE, TILE), tl.float32)
    end = tl.minimum(n, (split + 1) * chunk)
    for start in range(split * chunk, end, DEPTH):
        k = start + tl.arange(0, DEPTH)
        sequence = k // per_sequence
        position = (sequence + first + k % per_sequence * stride) % T
        row = (sequence * T + position).to(tl.int64) * row_stride  # (DEPTH,)
        z_i = tl.load(  # (TILE, DEPTH)
            z_ptr + column_i[:, None] + row, mask=(column_i < b)[:, None] & (k < end), other=0.0
        )
        z_j = tl.load(  # (DEPTH, TILE)
            z_ptr + row[:, None] + column_j, mask=(k < end)[:, None] & (column_j < b), other=0.0
        )
        acc = multiply_add(z_i, z_j, acc, PRECISION)
    program = (split * tl.num_programs(1) + block) * tl.num_programs(0) + tile
    target = within[:, None] * TILE + within
    tl.store(partial_ptr + program.to(tl.int64) * (TILE * TILE) + target, acc)


@triton.jit
def reduce_kernel(
    S_ptr,  # (blocks, b, b)
    partial_ptr,  # (splits, blocks, tiles, TILE, TILE)
    beta_ptr,  # (1,)
    alpha_ptr,  # (1,)
    splits,
    b,
    block_stride,
    row_stride,
    column_stride,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """S[r, c] = S[c, r] <- β S[r, c] + α Σ_split partial, for ROWS rows r >= c of one tile."""
    tile, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i, j = lower_tile(tile)
    row = part * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    column = tl.arange(0, TILE)[None, :]  # (1, TILE)
    program = (block * tl.num_programs(0) + tile).to(tl.int64)
    source = partial_ptr + program * (TILE * TILE) + row * TILE + column
    step = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * (TILE * TILE)
    total = tl.zeros((ROWS, TILE), tl.float32)
    for _ in range(splits):
        total += tl.load(source)
        source += step
    row, column = i * TILE + row, j * TILE + column
    is_lower = (row >= column) & (row < b)
    S_ptr += block.to(tl.int64) * block_stride
    target = S_ptr + row * row_stride + column * column_stride
    new = tl.load(beta_ptr) * tl.load(target, mask=is_lower) + tl.load(alpha_ptr) * total
    tl.store(target, new, mask=is_lower)
    mirrored = S_ptr + tl.trans(column * row_stride + row * column_stride)
    tl.store(mirrored, tl.trans(new), mask=tl.trans(is_lower))


def _check(S: Tensor, z: Tensor, stride: int) -> None:
    if z.ndim < 2 or z.dtype not in PRECISIONS:
        raise ValueError(
            f"gram_: z is {tuple(z.shape)} {z.dtype}; the Triton kernel wants (..., T, d) in bf16, "
            "fp16 or fp32"
        )
    if S.ndim != 3 or S.shape[1] != S.shape[2] or S.shape[0] * S.shape[1] != z.shape[-1]:
        raise ValueError(
            f"gram_: S is {tuple(S.shape)} and z is {tuple(z.shape)}; "
            "wants S (blocks, d/blocks, d/blocks) for z (..., T, d)"
        )
    if S.dtype != torch.float32 or S.device != z.device:
        raise ValueError(f"gram_: S is {S.dtype} on {S.device}; wants fp32 on z's {z.device}")
    if stride < 1:
        raise ValueError(f"gram_: stride={stride}; wants at least 1")
