"""S <- β S + α Σ z zᵀ on the GPU, in tiles of the lower triangle and splits of the tokens.

The reference is `gram_` in gram.py. The first kernel sums each split of the sampled tokens into its
own copy of every lower tile. In the second kernel, one program per element adds the copies in a
fixed order, updates the element of S, and writes it to both sides of the diagonal. The result is
therefore bitwise reproducible and exactly symmetric. Neither kernel reads the upper triangle. The
programs of diagonal tiles also sum z itself where `column_sums` are wanted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_tiles import (
    TileConfig,
    check_runs,
    lower_tile,
    multiply_add,
    n_lower_tiles,
    scalars,
)
from .gram import check_gram

PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "bf16", torch.float32: "tf32x3"}
CONFIGS = {
    "bf16": TileConfig(tile=128, depth=64, num_warps=8, num_stages=3),
    "tf32x3": TileConfig(tile=64, depth=32, num_warps=4, num_stages=3),
}
REDUCE_ROWS = 16  # rows of a tile per program of reduce_kernel
PROGRAMS = 264  # target for the number of programs: two per multiprocessor of an H100
SPLIT_ROWS = 512  # minimum number of tokens per split


def gram_(
    S: Tensor,  # (blocks, b, b) fp32, updated in place
    z: Tensor,  # (..., T, blocks·b) bf16, fp16 or fp32, one row per token
    *,
    beta: float | Tensor = 1.0,
    alpha: float | Tensor = 1.0,
    stride: int = 1,
    offset: int | Tensor = 0,
    column_sums: Tensor | None = None,  # (blocks·b,) fp32, updated in place
    config: TileConfig | None = None,
) -> int:  # count
    """Update S <- β S + α Σ z zᵀ in place over the sampled tokens and return their number.

    Like the reference, except that S must be symmetric. `beta`, `alpha` and `offset` may be tensors
    on the device and are not read on the host. Sums are in fp32; products of fp32 inputs are in
    tf32x3 precision.

    Raises:
        ValueError: like the reference, the dtype of S or z is not supported, or the tensors are not
            on a supported GPU.
    """
    check_gram(S, z, stride, column_sums)
    _check_dtypes(S, z)
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
        partial, columns = _partials(
            *(rows, S.shape, (n, T, per_sequence, stride), offset, precision, config),
            has_columns=column_sums is not None,
        )
        _reduce(S, partial, scalars(beta, 1, S), scalars(alpha, 1, S), config)
        if column_sums is not None and columns is not None:
            column_sums += columns.sum(0)
    return n


def split_rows(n: int, programs: int, depth: int) -> int:
    """Return the number of tokens per split of n: a multiple of `depth`, equal on all devices."""
    splits = max(1, min(PROGRAMS // programs, n // SPLIT_ROWS))
    return triton.cdiv(triton.cdiv(n, splits), depth) * depth


def _partials(
    rows: Tensor,  # (B T, blocks·b)
    shape: torch.Size,  # (blocks, b, b)
    sampling: tuple[int, int, int, int],  # n, T, per_sequence, stride
    offset: Tensor,  # () int64
    precision: str,
    config: TileConfig,
    *,
    has_columns: bool,
) -> tuple[Tensor, Tensor | None]:  # (splits, blocks, tiles, tile, tile), (splits, blocks·b)
    """Return the sums of each split: of each tile of the lower triangles, and of z if wanted."""
    blocks, b, _ = shape
    tile, depth, num_warps, num_stages = config
    tiles = n_lower_tiles(b, tile)
    chunk = split_rows(sampling[0], tiles * blocks, depth)
    splits = triton.cdiv(sampling[0], chunk)
    partial = rows.new_empty((splits, blocks, tiles, tile, tile), dtype=torch.float32)
    columns = partial.new_empty((splits, blocks * b)) if has_columns else None
    partial_kernel[(tiles, blocks, splits)](
        *(rows, partial, columns, offset, *sampling, chunk, rows.stride(0), b),
        **{"TILE": tile, "DEPTH": depth, "PRECISION": precision},
        **{"num_warps": num_warps, "num_stages": num_stages},
    )
    return partial, columns


def _reduce(S: Tensor, partial: Tensor, beta: Tensor, alpha: Tensor, config: TileConfig) -> None:
    """Reduce the partial sums of all splits into S."""
    splits, blocks, tiles, tile, _ = partial.shape
    rows = min(REDUCE_ROWS, tile)
    reduce_kernel[(tiles, blocks, tile // rows)](
        *(S, partial, beta, alpha, splits, S.shape[1], *S.stride()),
        **{"TILE": tile, "ROWS": rows, "num_warps": 4},
    )


@triton.jit
def partial_kernel(
    z_ptr,  # (B T, blocks·b), with stride row_stride between rows
    partial_ptr,  # (splits, blocks, tiles, TILE, TILE)
    columns_ptr,  # (splits, blocks·b), or None
    offset_ptr,  # () int64
    n,  # number of sampled tokens
    T,  # tokens per sequence
    per_sequence,  # sampled tokens per sequence
    stride,
    chunk,  # sampled tokens per split
    row_stride,
    b,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute partial[split, block, (i, j)] = Σ z_i z_jᵀ over the tokens of one split, i >= j.

    Unless `columns_ptr` is None, also compute columns[split, block, i] = Σ z_i.
    """
    tile, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i, j = lower_tile(tile)
    within = tl.arange(0, TILE)
    column_i, column_j = i * TILE + within, j * TILE + within
    first = tl.load(offset_ptr) % T
    first = tl.where(first < 0, first + T, first).to(tl.int32)
    z_ptr += block * b
    acc = tl.zeros((TILE, TILE), tl.float32)
    columns = tl.zeros((TILE,), tl.float32)
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
        if columns_ptr is not None:
            columns += tl.sum(z_i.to(tl.float32), axis=1)
    if columns_ptr is not None:
        columns_ptr += (split * tl.num_programs(1) + block) * b
        tl.store(columns_ptr + column_i, columns, mask=(column_i < b) & (i == j))
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
    """Set S[r, c] = S[c, r] <- β S[r, c] + α Σ_split partial for ROWS rows of one tile, r >= c."""
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


def _check_dtypes(S: Tensor, z: Tensor) -> None:
    if z.dtype not in PRECISIONS:
        raise ValueError(
            f"gram_: the Triton kernel supports bf16, fp16 and fp32, but z is {z.dtype}"
        )
    if S.dtype != torch.float32:
        raise ValueError(f"gram_: the Triton kernel needs S in fp32, but S is {S.dtype}")
