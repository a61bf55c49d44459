"""Symmetric products O = α A Bᵀ + β C + γ I on the GPU, at half the work of a full product.

Only the tiles of the lower triangle are computed. Each element is computed by one program, which
writes it to both sides of the diagonal, so O is exactly symmetric and bitwise reproducible. A Bᵀ is
symmetric if B = A, and if A and B are polynomials in one symmetric matrix (then A Bᵀ = A B).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_tiles import (
    Precision,
    TileConfig,
    check_runs,
    lower_tile,
    multiply_add,
    n_lower_tiles,
    scalars,
)

CONFIGS: dict[tuple[torch.dtype, Precision], TileConfig] = {
    (torch.bfloat16, "bf16"): TileConfig(tile=128, depth=64, num_warps=8, num_stages=3),
    (torch.float32, "bf16x3"): TileConfig(tile=128, depth=32, num_warps=8, num_stages=3),
    (torch.float32, "tf32"): TileConfig(tile=128, depth=32, num_warps=8, num_stages=3),
    (torch.float32, "ieee"): TileConfig(tile=64, depth=16, num_warps=4, num_stages=3),
}


def symmetric_product(
    A: Tensor,  # (N, d, k) bf16 or fp32
    B: Tensor,  # (N, d, k), like A
    *,
    alpha: float | Tensor = 1.0,  # number or (N,)
    beta: float | Tensor = 1.0,  # number or (N,)
    C: Tensor | None = None,  # (N, d, d), like A; only its lower triangle is read
    gamma: float | Tensor = 0.0,  # number or (N,)
    precision: Precision,
    config: TileConfig | None = None,
) -> Tensor:  # (N, d, d), like A, exactly symmetric
    """Return α A Bᵀ + β C + γ I with fp32 sums; A Bᵀ must be symmetric.

    The coefficients may be tensors on the device and are not read on the host. bf16 factors need
    precision="bf16"; see `multiply_add` for the precisions of fp32 factors.

    Raises:
        ValueError: the combination of dtype and precision is not supported, the shapes or dtypes do
            not match, or the tensors are not on a supported GPU.
    """
    _check(A, B, C, precision)
    coefficients = [scalars(value, len(A), A) for value in (alpha, beta, gamma)]
    config = config or CONFIGS[A.dtype, precision]
    return _symmetric_product(A, B, C, *coefficients, precision, list(config))


@torch.library.custom_op("dopr::symmetric_product", mutates_args=())
def _symmetric_product(
    A: Tensor,  # (N, d, k)
    B: Tensor,  # (N, d, k)
    C: Tensor | None,  # (N, d, d)
    alpha: Tensor,  # (N,)
    beta: Tensor,  # (N,)
    gamma: Tensor,  # (N,)
    precision: str,
    config: list[int],
) -> Tensor:  # (N, d, d)
    """Launch the kernel; an opaque operator that torch.compile does not trace."""
    check_runs("symmetric_product", A)
    tile, depth, num_warps, num_stages = config
    N, d, k = A.shape
    A, B = A.contiguous(), B.contiguous()
    C = C if C is None else C.contiguous()
    out = A.new_empty((N, d, d))
    with torch.cuda.device_of(A):
        symmetric_kernel[(n_lower_tiles(d, tile), N)](
            *(A, B, C, out, alpha, beta, gamma, d, k),
            **{"TILE": tile, "DEPTH": depth, "PRECISION": precision},
            **{"num_warps": num_warps, "num_stages": num_stages},
        )
    return out


@_symmetric_product.register_fake
def _(
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    precision: str,
    config: list[int],
) -> Tensor:
    return A.new_empty((A.shape[0], A.shape[1], A.shape[1]))


@triton.jit
def symmetric_kernel(
    A_ptr,  # (N, d, k)
    B_ptr,  # (N, d, k)
    C_ptr,  # (N, d, d) or None
    O_ptr,  # (N, d, d)
    alpha_ptr,  # (N,)
    beta_ptr,  # (N,)
    gamma_ptr,  # (N,)
    d,
    k,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute tile (i, j), i >= j, of O and store it and its mirror image."""
    tile, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, j = lower_tile(tile)
    row, column = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    rows = A_ptr + n * d * k + row[:, None] * k  # (TILE, 1)
    columns = B_ptr + n * d * k + column[None, :] * k  # (1, TILE)
    is_row, is_column = (row < d)[:, None], (column < d)[None, :]
    acc = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, k, DEPTH):
        term = start + tl.arange(0, DEPTH)
        is_term = term < k
        a = tl.load(rows + term[None, :], mask=is_row & is_term[None, :], other=0.0)
        b = tl.load(columns + term[:, None], mask=is_term[:, None] & is_column, other=0.0)
        acc = multiply_add(a, b, acc, PRECISION)
    acc = acc * tl.load(alpha_ptr + n)
    row, column = row[:, None], column[None, :]
    is_lower = (row >= column) & (row < d)
    if C_ptr is not None:
        c = tl.load(C_ptr + n * d * d + row * d + column, mask=is_lower, other=0.0)
        acc += tl.load(beta_ptr + n) * c.to(tl.float32)
    acc += tl.where(row == column, tl.load(gamma_ptr + n), 0.0)
    o = acc.to(O_ptr.dtype.element_ty)
    O_ptr += n * d * d
    tl.store(O_ptr + row * d + column, o, mask=is_lower)
    tl.store(O_ptr + tl.trans(column * d + row), tl.trans(o), mask=tl.trans(is_lower))


def _check(A: Tensor, B: Tensor, C: Tensor | None, precision: str) -> None:
    if (A.dtype, precision) not in CONFIGS:
        supported = ", ".join(f"{p} for {str(t).removeprefix('torch.')}" for t, p in CONFIGS)
        raise ValueError(
            f"symmetric_product: precision={precision!r} is not available for {A.dtype}; "
            f"supported: {supported}"
        )
    if A.ndim != 3 or A.shape != B.shape:
        raise ValueError(
            "symmetric_product: expected A and B of one shape (N, d, k), but A is "
            f"{tuple(A.shape)} and B is {tuple(B.shape)}"
        )
    if A.shape[1] * max(A.shape[1:]) >= 2**31:
        raise ValueError(
            f"symmetric_product: A is {tuple(A.shape)}; a matrix must have < 2³¹ elements"
        )
    square = (A.shape[0], A.shape[1], A.shape[1])
    if C is not None and C.shape != square:
        raise ValueError(f"symmetric_product: expected C of shape {square}, got {tuple(C.shape)}")
    for X in (B, C):
        if X is not None and (X.dtype != A.dtype or X.device != A.device):
            raise ValueError(
                "symmetric_product: expected one dtype and one device, but got "
                f"{A.dtype} on {A.device} and {X.dtype} on {X.device}"
            )
