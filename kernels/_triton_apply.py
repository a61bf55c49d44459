"""M = G P on the GPU: multiply gradients by their preconditioners, for layers of equal shape.

P amplifies rounding errors by up to its condition number, so G is never rounded to bf16. The
reference is `apply_P` in optim/dopr/statistics.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_tiles import Precision, TileConfig, check_runs, multiply_add

CONFIGS: dict[Precision, TileConfig] = {
    "bf16x3": TileConfig(tile=128, depth=32, num_warps=8, num_stages=3),
    "tf32x3": TileConfig(tile=64, depth=32, num_warps=4, num_stages=3),
    "ieee": TileConfig(tile=64, depth=16, num_warps=4, num_stages=3),
}


def apply(
    G: Tensor,  # (N, m, blocks·b) fp32, with any strides
    P: Tensor,  # (N, blocks, b, b) fp32
    *,
    precision: Precision = "tf32x3",
    config: TileConfig | None = None,
) -> Tensor:  # (N, m, blocks·b) fp32
    """Return M = G P for a block-diagonal P, with fp32 sums.

    See `multiply_add` for the precisions.

    Raises:
        ValueError: `precision` is not one of CONFIGS, the shapes do not match, a tensor is not
            fp32, or the tensors are not on a supported GPU.
    """
    _check(G, P, precision)
    return _apply(G, P, precision, list(config or CONFIGS[precision]))


@torch.library.custom_op("dopr::apply", mutates_args=())
def _apply(G: Tensor, P: Tensor, precision: str, config: list[int]) -> Tensor:
    """Launch the kernel; an opaque operator that torch.compile does not trace."""
    check_runs("apply", G)
    tile, depth, num_warps, num_stages = config
    (N, m, d), (_, blocks, b, _) = G.shape, P.shape
    P = P.contiguous()
    M = G.new_empty((N, m, d))
    tiles = triton.cdiv(m, tile) * triton.cdiv(b, tile)
    with torch.cuda.device_of(G):
        apply_kernel[(tiles, blocks, N)](
            *(G, P, M, m, b, *G.stride()),
            **{"TILE": tile, "DEPTH": depth, "PRECISION": precision},
            **{"num_warps": num_warps, "num_stages": num_stages},
        )
    return M


@_apply.register_fake
def _(G: Tensor, P: Tensor, precision: str, config: list[int]) -> Tensor:
    return G.new_empty(G.shape)


@triton.jit
def apply_kernel(
    G_ptr,  # (N, m, blocks·b)
    P_ptr,  # (N, blocks, b, b)
    M_ptr,  # (N, m, blocks·b)
    m,
    b,
    G_stride,
    G_row_stride,
    G_column_stride,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one tile of M. Neighboring programs read the same rows of G."""
    tile, block, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks = tl.num_programs(1)
    across = tl.cdiv(b, TILE)
    row = tile // across * TILE + tl.arange(0, TILE)
    column = tile % across * TILE + tl.arange(0, TILE)
    n, block = n.to(tl.int64), block.to(tl.int64)
    G_ptr += n * G_stride + block * b * G_column_stride
    rows = G_ptr + row[:, None] * G_row_stride  # (TILE, 1)
    columns = P_ptr + (n * blocks + block) * b * b + column[None, :]  # (1, TILE)
    is_row, is_column = (row < m)[:, None], (column < b)[None, :]
    acc = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, b, DEPTH):
        k = start + tl.arange(0, DEPTH)
        is_term = k < b
        terms = rows + k[None, :] * G_column_stride
        g = tl.load(terms, mask=is_row & is_term[None, :], other=0.0)
        p = tl.load(columns + k[:, None] * b, mask=is_term[:, None] & is_column, other=0.0)
        acc = multiply_add(g, p, acc, PRECISION)
    target = M_ptr + n * m * (blocks * b) + block * b + row[:, None] * (blocks * b)
    tl.store(target + column[None, :], acc, mask=is_row & is_column)


def _check(G: Tensor, P: Tensor, precision: str) -> None:
    if precision not in CONFIGS:
        raise ValueError(f"apply: precision={precision!r}: must be one of {', '.join(CONFIGS)}")
    is_batch = G.ndim == 3 and P.ndim == 4 and len(P) == len(G) and P.shape[2] == P.shape[3]
    if not is_batch or P.shape[1] * P.shape[2] != G.shape[2]:
        raise ValueError(
            "apply: expected G of shape (N, m, d) and P of shape (N, blocks, d/blocks, d/blocks), "
            f"but G is {tuple(G.shape)} and P is {tuple(P.shape)}"
        )
    (m, d), (row, column) = G.shape[1:], G.stride()[1:]
    if max(m * d, m * row + d * column) >= 2**31:
        raise ValueError(
            f"apply: G is {tuple(G.shape)} with strides {G.stride()}; a matrix must have and span "
            "< 2³¹ elements"
        )
    if G.dtype != torch.float32 or P.dtype != torch.float32 or P.device != G.device:
        raise ValueError(
            f"apply: expected fp32 tensors on one device, but G is {G.dtype} on {G.device} "
            f"and P is {P.dtype} on {P.device}"
        )
