"""Newton-Schulz iterations on the GPU, with symmetric products at half the work.

See `newton_schulz.py` for the mathematics. Nothing here synchronizes with the device: the number of
iterations is fixed, and the coefficients of each step stay on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton_symmetric import symmetric_product
from ._triton_tiles import Precision, scalars
from .newton_schulz import (
    NSCoefficients,
    check_inverse_root,
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
    """Like `newton_schulz.orthogonalize`, with X Xᵀ and b A + c A² by Triton and B X by cuBLAS.

    Raises:
        ValueError: like the reference, or `dtype` is neither bf16 nor fp32.
    """
    check_orthogonalize(G, steps, ns_coefficients)
    if dtype not in ITERATION_PRECISION:
        raise ValueError(f"orthogonalize: dtype={dtype}: the Triton kernel supports bf16 and fp32")
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
    """Like `newton_schulz.inverse_root`, with T = a (I - c M) folded into the products.

    X T is computed as a X - a c X M, and Tᵖ M in the same way. Every factor is a polynomial in A,
    so every product is symmetric. The relative error is about the condition number times 5e-9
    (precision="ieee"), 1e-7 ("bf16x3") or 8e-6 ("tf32"); check the result with `probe_residual`.

    Raises:
        ValueError: like the reference, A is not fp32, or `precision` is not one of the three.
    """
    check_inverse_root(A, p, iterations)
    if A.dtype != torch.float32:
        raise ValueError(f"inverse root: the Triton kernel supports fp32 only, but got {A.dtype}")
    if precision not in ("bf16x3", "tf32", "ieee"):
        raise ValueError(
            f"inverse root: precision={precision!r}: must be 'bf16x3', 'tf32' or 'ieee'"
        )
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
    """Return Tᵖ M (N, d, d) for T = a (I - c M) and a, c (N,).

    This takes one product for p = 1, two for p = 2 and three for p = 4.
    """
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
