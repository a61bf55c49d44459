"""Newton-Schulz iterations for polar factors of gradients and inverse roots of covariances.

This is the torch reference and the specification of `_triton_newton_schulz.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice, repeat
from typing import Literal

import torch
from torch import Tensor

from .precision import full_precision
from .symmetric import mirror_

NSCoefficients = Literal["polar_express", "quintic"]

# A row (a, b, c) holds the coefficients of one step p(x) = a x + b x³ + c x⁵.
QUINTIC = ((3.4445, -4.7750, 2.0315),)
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# All polynomials but the last take x / SAFETY, so that rounding cannot push x out of the interval.
SAFETY = 1.01
NS_COEFFICIENTS = {
    "polar_express": (
        *((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]),
        POLAR_EXPRESS[-1],
    ),
    "quintic": QUINTIC,
}


def orthogonalize(
    G: Tensor,  # (..., m, n)
    *,
    steps: int = 5,
    ns_coefficients: NSCoefficients = "polar_express",
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # (..., m, n), in G's dtype
    """Move every singular value of G towards 1: U S Vᵀ -> U p(S) Vᵀ with p(S) ≈ I.

    Start from X = G / ‖G‖_F and repeat X <- a X + (b A + c A²) X with A = X Xᵀ, `steps` times. The
    iteration runs in `dtype`; the norm is computed in fp32 or better. A zero matrix stays zero.

    Raises:
        ValueError: G is not a floating-point matrix or batch of matrices, `steps` is below 1, or
            `ns_coefficients` is unknown.

    Sources: "quintic" is Jordan et al., Muon (2024); "polar_express" is Amsel et al.,
    arXiv 2505.16932, Algorithm 1.
    """
    check_orthogonalize(G, steps, ns_coefficients)
    is_tall = G.shape[-2] > G.shape[-1]
    X = normalized(G.mT if is_tall else G, ns_coefficients).to(dtype)
    batch = X.reshape(-1, *X.shape[-2:])  # (B, m, n), m <= n
    for a, b, c in polynomials(ns_coefficients, steps):
        A = batch @ batch.mT  # (B, m, m)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        batch = torch.baddbmm(batch, B, batch, beta=a)
    X = batch.reshape(X.shape).to(G.dtype)
    return X.mT if is_tall else X


def check_orthogonalize(G: Tensor, steps: int, ns_coefficients: str) -> None:
    """Raise ValueError if the arguments of `orthogonalize` are invalid."""
    if G.ndim < 2 or not G.is_floating_point():
        raise ValueError(
            f"orthogonalize: expected a floating-point G of shape (..., m, n), but G is "
            f"{tuple(G.shape)} {G.dtype}"
        )
    if steps < 1:
        raise ValueError(f"orthogonalize: steps={steps}: must be at least 1")
    if ns_coefficients not in NS_COEFFICIENTS:
        raise ValueError(
            f"orthogonalize: ns_coefficients={ns_coefficients!r}: must be one of "
            f"{', '.join(NS_COEFFICIENTS)}"
        )


def normalized(G: Tensor, ns_coefficients: NSCoefficients) -> Tensor:
    """Return G / ‖G‖_F in fp32 or better.

    G is divided by its largest entry first, so that the norm neither overflows nor underflows.
    """
    G = G.to(torch.promote_types(G.dtype, torch.float32))
    largest = G.abs().amax(dim=(-2, -1), keepdim=True)
    G = G / torch.where(largest > 0, largest, 1)
    norm = torch.linalg.matrix_norm(G, keepdim=True)
    margin = SAFETY if ns_coefficients == "polar_express" else 1.0
    return G / torch.where(norm > 0, norm * margin, 1)


def polynomials(name: NSCoefficients, steps: int) -> Iterator[tuple[float, float, float]]:
    """Yield (a, b, c) of each step; the last row of the table repeats."""
    rows = NS_COEFFICIENTS[name]
    return islice(chain(rows, repeat(rows[-1])), steps)


def inverse_root(
    A: Tensor,  # (..., d, d), symmetric positive definite
    p: int,  # 1, 2 or 4
    *,
    lower_bound: float | Tensor,  # (...), at most the smallest eigenvalue of each matrix, > 0
    iterations: int,
) -> Tensor:  # (..., d, d), exactly symmetric, in A's dtype
    """Compute A^(-1/p) by a coupled Newton iteration that is rescaled at each step.

    Start from M = A / u, where u is `upper_bound(A)`, and X = u^(-1/p) I. Repeat X <- X T and
    M <- Tᵖ M with T = a (I - c M), which keeps M = A Xᵖ. The scalars (a, c) minimize the condition
    number of the next M over all spectra in [l, 1], where l bounds the eigenvalues of M from below.
    Both products are symmetrized. For A = Σ + γ̄ I, γ̄ is a valid `lower_bound`.

    Take `iterations` from `newton_iterations`. There is no data-dependent control flow; use
    `probe_residual` to find the matrices that did not converge. In fp32, the relative error of the
    result is about 1e-8 times the condition number; TF32 is switched off.

    Raises:
        ValueError: A, `p` or `iterations` is invalid.

    Sources: Higham, Functions of Matrices (2008), section 7.3, for the iteration. For p = 1, the
    scaling is that of the Chebyshev-accelerated Newton-Schulz iteration.
    """
    check_inverse_root(A, p, iterations)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    upper = upper_bound(A)[..., None, None]  # (..., 1, 1)
    lower = torch.as_tensor(lower_bound, dtype=A.dtype, device=A.device)[..., None, None]
    M, X, low = A / upper, eye * upper ** (-1 / p), lower / upper
    with full_precision(A.device.type):
        for _ in range(iterations):
            a, c, low = scaled_step(low, p)
            T = a * (eye - c * M)
            X = mirror_(X @ T)
            M = mirror_(_times_power(M, T, p))
    return X * ((1 + low) / 2) ** (-1 / p)  # center the remaining interval [low, 1] on 1


def newton_iterations(condition: float, p: int, *, tolerance: float = 1e-4) -> int:
    """Return the number of iterations after which `inverse_root` is accurate to `tolerance`.

    The tolerance is relative and holds in exact arithmetic. `condition` must be at least
    upper_bound(A) / lower_bound. For A = Σ + γ tr(Σ)/d I, d/γ + √d is such a bound and does not
    depend on the data.

    Raises:
        ValueError: `condition` is not a finite number >= 1.
    """
    if not 1 <= condition < float("inf"):
        raise ValueError(
            f"newton_iterations: condition={condition}: must be a finite number, at least 1"
        )
    low, steps = 1 / condition, 0
    while (1 - low) / (2 * p) > tolerance:
        low, steps = scaled_step(low, p)[2], steps + 1
    return steps


def newton_error(condition: Tensor, p: int, iterations: int) -> Tensor:  # (...) -> (...)
    """Return the relative error of `inverse_root` after `iterations`, in exact arithmetic."""
    low = 1 / condition
    for _ in range(iterations):
        low = scaled_step(low, p)[2]
    return (1 - low) / (2 * p)


def upper_bound(A: Tensor) -> Tensor:  # (..., d, d) -> (...)
    """Return min(‖A‖_F, ‖A‖_∞), an upper bound on the largest eigenvalue of a symmetric A."""
    scale = A.abs().amax(dim=(-2, -1), keepdim=True)  # prevents overflow of the squares
    unit = A / torch.where(scale > 0, scale, 1)
    frobenius = torch.linalg.matrix_norm(unit)
    row_sum = unit.abs().sum(dim=-1).amax(dim=-1)
    return torch.minimum(frobenius, row_sum) * scale[..., 0, 0]


def probe_residual(sigma: Tensor, damping: Tensor, X: Tensor, p: int) -> Tensor:  # (n,)
    """Return ‖V - A Xᵖ V‖_F / ‖V‖_F for A = Σ + damping I and fixed V (d, 4).

    It is 0 if X = A^(-1/p), and not finite if an element of X is not.

    Args:
        sigma, X: (n, d, d).
        damping: (n,).
    """
    i = torch.arange(1, X.shape[-1] + 1, dtype=torch.float64, device=X.device)[:, None]
    roots = torch.tensor([2.0, 3.0, 5.0, 7.0], dtype=torch.float64, device=X.device).sqrt()
    V = torch.cos(i.square() * roots).to(X.dtype)  # (d, 4), deterministic pseudo-noise
    with full_precision(X.device.type):
        Y = V
        for _ in range(p):
            Y = X @ Y
        residual = V - sigma @ Y - damping[:, None, None] * Y
    return torch.linalg.matrix_norm(residual) / torch.linalg.matrix_norm(V)


def check_inverse_root(A: Tensor, p: int, iterations: int = 0) -> None:
    """Raise ValueError if the arguments of an inverse root are invalid."""
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or A.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "inverse root: expected a matrix of shape (..., d, d) in fp32 or float64, but got "
            f"{tuple(A.shape)} {A.dtype}"
        )
    if p not in (1, 2, 4):
        raise ValueError(f"inverse root: p={p}: must be 1, 2 or 4")
    if iterations < 0:
        raise ValueError(f"inverse root: iterations={iterations}: must be at least 0")


def scaled_step(low, p: int):
    """Return (a, c) of T = a (I - c M) for a spectrum of M in [low, 1], and the next `low`.

    f(x) = x (1 - c x)ᵖ has its maximum at x = 1 / (c (p + 1)). c is chosen such that f(low) = f(1),
    and a such that the maximum of aᵖ f is 1. `low` may be a float or a tensor.
    """
    root = low ** (1 / p)
    c = 1 / sum(root**j for j in range(p + 1))
    peak = p**p / (p + 1) ** (p + 1)
    a = (c / peak) ** (1 / p)
    return a, c, c * low * (1 - c * low) ** p / peak


def _times_power(M: Tensor, T: Tensor, p: int) -> Tensor:
    """Return Tᵖ M, where T is a polynomial in M; for an even p, as T^(p/2) M T^(p/2)."""
    if p == 1:
        return T @ M
    half = T if p == 2 else T @ T
    return half @ M @ half
