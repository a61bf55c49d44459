"""O = α A Bᵀ + β C + γ I on the GPU, where the result is symmetric: half of a product's work.

Only tiles of the lower triangle are computed; each element has one owner, which writes it to both
sides of the diagonal, so O is exactly symmetric and bitwise reproducible. A Bᵀ is symmetric for
B = A, and for polynomials A and B in one symmetric matrix, where it is A B.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_tiles import (
    Config,
    Precision,
    check_runs,
    lower_tile,
    multiply_add,
    n_lower_tiles,
    scalars,
)

CONFIGS: dict[tuple[torch.dtype, Precision], Config] = {
    (torch.bfloat16, "bf16"): Config(tile=128, depth=64, num_warps=8, num_stages=3),
    (torch.float32, "bf16x3"): Config(tile=128, depth=32, num_warps=8, num_stages=3),
    (torch.float32, "tf32"): Config(tile=128, depth=32, num_warps=8, num_stages=3),
    (torch.float32, "ieee"): Config(tile=64, depth=16, num_warps=4, num_stages=3),
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
    config: Config | None = None,
) -> Tensor:  # (N, d, d), like A, exactly symmetric
    """α A Bᵀ + β C + γ I with fp32 sums, for A and B such that A Bᵀ is symmetric.

    The coefficients may be tensors on the device: nothing waits for it. Of bf16 factors the only
    precision is "bf16"; for fp32 ones see `multiply_add`.

    Raises ValueError for a dtype or precision that it does not take, shapes that do not fit, or
    no GPU.
    """
    _check(A, B, C, precision)
    ns_coefficients = [scalars(each, len(A), A) for each in (alpha, beta, gamma)]
    config = config or CONFIGS[A.dtype, precision]
    return _symmetric_product(A, B, C, *ns_coefficients, precision, list(config))


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
    """The launch, as one operator that torch.compile does not look into."""
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
    """Tile (i, j), i >= j, of O, and its mirror image."""
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
        shipped = ", ".join(f"{p} of {str(t).removeprefix('torch.')}" for t, p in CONFIGS)
        raise ValueError(f"symmetric_product: {precision} of {A.dtype}; takes {shipped}")
    if A.ndim != 3 or A.shape != B.shape:
        raise ValueError(
            f"symmetric_product: A is {tuple(A.shape)} and B {tuple(B.shape)}; wants (N, d, k) both"
        )
    if A.shape[1] * max(A.shape[1:]) >= 2**31:
        raise ValueError(f"symmetric_product: {tuple(A.shape)}; wants < 2³¹ elements a matrix")
    square = (A.shape[0], A.shape[1], A.shape[1])
    if C is not None and C.shape != square:
        raise ValueError(f"symmetric_product: C is {tuple(C.shape)}; wants {square}")
    for each in (B, C):
        if each is not None and (each.dtype != A.dtype or each.device != A.device):
            raise ValueError(
                f"symmetric_product: got {A.dtype} on {A.device} and {each.dtype} on "
                f"{each.device}; wants one dtype and one device"
            )
