"""Newton-Schulz iterations on the GPU, their symmetric products at half the work.

Semantics: `kernels.newton_schulz`, whose docstrings hold the mathematics. Nothing waits for the
device: the number of iterations is fixed, and the coefficients of each step stay where they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton_symmetric import symmetric_product
from ._triton_tiles import Precision, scalars
from .newton_schulz import (
    NSCoefficients,
    check_orthogonalize,
    normalized,
    polynomials,
    scaled_step,
    upper_bound,
)

ITERATION_PRECISION: dict[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float32: "ieee"}


def orthogonalize(
    G: Tensor,  # (..., m, n)
    *,
    steps: int = 5,
    ns_coefficients: NSCoefficients = "polar_express",
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # (..., m, n), in G's dtype
    """As `kernels.newton_schulz.orthogonalize`: X Xᵀ and b A + c A² by tiles, B X by cuBLAS.

    Raises ValueError for bad arguments, and for a `dtype` other than bf16 and fp32.
    """
    check_orthogonalize(G, steps, ns_coefficients)
    if dtype not in ITERATION_PRECISION:
        raise ValueError(f"orthogonalize: dtype={dtype}; the Triton kernel wants bf16 or fp32")
    precision = ITERATION_PRECISION[dtype]
    is_tall = G.shape[-2] > G.shape[-1]
    X = normalized(G.mT if is_tall else G, ns_coefficients).to(dtype)
    batch = X.reshape(-1, *X.shape[-2:])  # (N, m, n), m <= n
    for a, b, c in polynomials(ns_coefficients, steps):
        A = symmetric_product(batch, batch, precision=precision)  # (N, m, m)
        B = symmetric_product(A, A, alpha=c, beta=b, C=A, precision=precision)
        batch = torch.baddbmm(batch, B, batch, beta=a)
    X = batch.reshape(X.shape).to(G.dtype)
    return X.mT if is_tall else X


def inverse_root(
    A: Tensor,  # (..., d, d) fp32, symmetric positive definite
    p: int,  # 1, 2 or 4
    *,
    lower_bound: float | Tensor,  # (...), at most the smallest eigenvalue of each matrix, > 0
    iterations: int,
    precision: Precision = "bf16x3",
) -> Tensor:  # (..., d, d) fp32, exactly symmetric
    """A^(-1/p) as `kernels.newton_schulz.inverse_root`, with T = a (I - c M) folded into products.

    X T = a X - a c X M, and in the same way Tᵖ M: every product is a polynomial in A, so all are
    symmetric. The error floor is about the condition number times 5e-9 (ieee), 1e-7 (bf16x3) or
    8e-6 (tf32): check the result with `probe_residual`.

    Raises ValueError for bad arguments.
    """
    _check_inverse_root(A, p, iterations, precision)
    flat = A.reshape(-1, *A.shape[-2:])  # (N, d, d)
    upper = upper_bound(flat)  # (N,)
    if isinstance(lower_bound, Tensor):
        lower_bound = lower_bound.expand(A.shape[:-2]).reshape(-1)
    low = scalars(lower_bound, len(flat), like=A) / upper
    X = torch.diag_embed((upper ** (-1 / p))[:, None].expand(-1, A.shape[-1]))
    M = flat / upper[:, None, None]
    for _ in range(iterations):
        a, c, low = scaled_step(low, p)
        X = symmetric_product(X, M, alpha=-a * c, beta=a, C=X, precision=precision)
        M = _times_power(M, a, c, p, precision)
    X = X * (((1 + low) / 2) ** (-1 / p))[:, None, None]
    return X.view(A.shape)


def _times_power(M: Tensor, a: Tensor, c: Tensor, p: int, precision: Precision) -> Tensor:
    """Tᵖ M, (N, d, d), for T = a (I - c M) and a, c (N,): by p products, or three for p = 4."""
    if p == 4:
        square = symmetric_product(  # T² = a² (I - 2 c M + c² M²)
            *(M, M), alpha=(a * c) ** 2, beta=-2 * a**2 * c, C=M, gamma=a**2, precision=precision
        )
        half = symmetric_product(square, M, precision=precision)
        return symmetric_product(half, square, precision=precision)
    power = M
    for _ in range(p):
        power = symmetric_product(power, M, alpha=-a * c, beta=a, C=power, precision=precision)
    return power


def _check_inverse_root(A: Tensor, p: int, iterations: int, precision: str) -> None:
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or A.dtype != torch.float32:
        raise ValueError(
            f"inverse_root: A is {tuple(A.shape)} {A.dtype}; the Triton kernel wants (..., d, d) "
            "in fp32"
        )
    if p not in (1, 2, 4):
        raise ValueError(f"inverse_root: p={p}; wants 1, 2 or 4")
    if iterations < 0:
        raise ValueError(f"inverse_root: iterations={iterations}; wants 0 or more")
    if precision not in ("bf16x3", "tf32", "ieee"):
        raise ValueError(f"inverse_root: precision={precision!r}; use 'bf16x3', 'tf32' or 'ieee'")
