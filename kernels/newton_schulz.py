"""Matrix functions by Newton-Schulz iteration: polar factors of gradients, inverse roots of Σ.

This is the torch reference, and the specification of the Triton kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice, repeat
from typing import Literal

import torch
from torch import Tensor

from .gram import mirror_

NSCoefficients = Literal["polar_express", "quintic"]

# One row (a, b, c) is one step p(x) = a x + b x³ + c x⁵.
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
# Each polynomial but the last takes x / SAFETY, so that rounding cannot push x past its interval.
SAFETY = 1.01
NS_COEFFICIENTS = {
    "quintic": QUINTIC,
    "polar_express": (
        *((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]),
        POLAR_EXPRESS[-1],
    ),
}


def orthogonalize(
    G: Tensor,  # (..., m, n)
    *,
    steps: int = 5,
    ns_coefficients: NSCoefficients = "polar_express",
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # (..., m, n), in G's dtype
    """Push every singular value of G towards 1: U S Vᵀ -> U p(S) Vᵀ, with p(S) ≈ I.

    X <- G / ‖G‖_F, then X <- a X + (b A + c A²) X with A = X Xᵀ, `steps` times. `dtype` is that of
    the iteration; the norm is taken in fp32 or better. A zero matrix gives zeros.

    Raises ValueError for bad arguments. Sources: "quintic" is Jordan et al., Muon (2024);
    "polar_express" is Amsel et al., arXiv 2505.16932, Algorithm 1.
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
    if G.ndim < 2 or not G.is_floating_point():
        raise ValueError(
            f"orthogonalize: G is {tuple(G.shape)} {G.dtype}; wants a floating (..., m, n)"
        )
    if steps < 1:
        raise ValueError(f"orthogonalize: steps={steps}; wants at least 1")
    if ns_coefficients not in NS_COEFFICIENTS:
        raise ValueError(
            f"orthogonalize: ns_coefficients={ns_coefficients!r}; use 'polar_express' or 'quintic'"
        )


def normalized(G: Tensor, ns_coefficients: NSCoefficients) -> Tensor:
    """G / ‖G‖_F in fp32 or better, for any scale of G: the largest entry is divided out first."""
    G = G.to(torch.promote_types(G.dtype, torch.float32))
    largest = G.abs().amax(dim=(-2, -1), keepdim=True)
    G = G / torch.where(largest > 0, largest, 1)
    norm = torch.linalg.matrix_norm(G, keepdim=True)
    margin = SAFETY if ns_coefficients == "polar_express" else 1.0
    return G / torch.where(norm > 0, norm * margin, 1)


def polynomials(
    ns_coefficients: NSCoefficients, steps: int
) -> Iterator[tuple[float, float, float]]:
    rows = NS_COEFFICIENTS[ns_coefficients]
    return islice(chain(rows, repeat(rows[-1])), steps)


def inverse_root(
    A: Tensor,  # (..., d, d), symmetric positive definite
    p: int,  # 1, 2 or 4
    *,
    lower_bound: float | Tensor,  # (...), at most the smallest eigenvalue of each matrix, > 0
    iterations: int,
) -> Tensor:  # (..., d, d), exactly symmetric, in A's dtype
    """A^(-1/p) by coupled Newton iteration, scaled at each step to the bounds on the spectrum.

    X <- X T and M <- Tᵖ M with T = a (I - c M), from M = A / u and X = u^(-1/p) I, so that
    M = A Xᵖ throughout. (a, c) minimise the condition number of the next M for a spectrum
    anywhere in [l, 1]; both products are made symmetric. For A = Σ + γ̄ I the bound l = γ̄ is free.

    Take `iterations` from `newton_iterations`. There is no data-dependent control flow: a matrix
    that did not converge is found by `probe_residual`. In fp32 the error of the result is about
    1e-8 times the condition number, and TF32 is switched off.

    Raises ValueError for bad arguments. Sources: Higham, Functions of Matrices (2008), section 7.3,
    for the iteration; the scaling for p = 1 is that of Chebyshev-accelerated Newton-Schulz.
    """
    _check_inverse_root(A, p, iterations)
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
    return X * ((1 + low) / 2) ** (-1 / p)  # M lies in [low, 1]: centre it on 1


def newton_iterations(condition: float, p: int, *, tolerance: float = 1e-4) -> int:
    """Steps after which `inverse_root` is within `tolerance` (relative), in exact arithmetic.

    `condition` bounds upper_bound(A) / lower_bound; for A = Σ + γ tr(Σ)/d I it is at most
    d/γ + √d, which needs no look at the data.
    """
    if not 1 <= condition < float("inf"):
        raise ValueError(f"newton_iterations: condition={condition}; wants a finite number >= 1")
    low, steps = 1 / condition, 0
    while (1 - low) / (2 * p) > tolerance:
        low, steps = scaled_step(low, p)[2], steps + 1
    return steps


def newton_error(condition: Tensor, p: int, iterations: int) -> Tensor:  # (...) -> (...)
    """The relative error that `iterations` leave in exact arithmetic; `newton_iterations` has it
    below its tolerance.
    """
    low = 1 / condition
    for _ in range(iterations):
        low = scaled_step(low, p)[2]
    return (1 - low) / (2 * p)


def upper_bound(A: Tensor) -> Tensor:  # (..., d, d) -> (...)
    """min(‖A‖_F, ‖A‖_∞), which for a symmetric A is at least the largest eigenvalue."""
    scale = A.abs().amax(dim=(-2, -1), keepdim=True)  # keeps the squares in range
    unit = A / torch.where(scale > 0, scale, 1)
    frobenius = torch.linalg.matrix_norm(unit)
    row_sum = unit.abs().sum(dim=-1).amax(dim=-1)
    return torch.minimum(frobenius, row_sum) * scale[..., 0, 0]


def probe_residual(A: Tensor, X: Tensor, p: int) -> Tensor:  # (..., d, d) twice -> (...)
    """‖V - A Xᵖ V‖_F / ‖V‖_F for fixed probe vectors V: 0 if X = A^(-1/p), NaN if not finite."""
    i = torch.arange(1, A.shape[-1] + 1, dtype=torch.float64, device=A.device)[:, None]
    roots = torch.tensor([2.0, 3.0, 5.0, 7.0], dtype=torch.float64, device=A.device).sqrt()
    V = torch.cos(i.square() * roots).to(A.dtype)  # (d, 4), like noise but the same every time
    with full_precision(A.device.type):
        Y = V
        for _ in range(p):
            Y = X @ Y
        residual = V - A @ Y
    return torch.linalg.matrix_norm(residual) / torch.linalg.matrix_norm(V)


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Matrix products in their factors' own precision: no TF32, no autocast, whatever is set.

    Of torch's two ways to set it, `fp32_precision` is what products look at, and may always be
    read: `get_float32_matmul_precision` raises where someone has set `fp32_precision`.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _check_inverse_root(A: Tensor, p: int, iterations: int) -> None:
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or A.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"inverse_root: A is {tuple(A.shape)} {A.dtype}; wants (..., d, d) in fp32 or float64"
        )
    if p not in (1, 2, 4):
        raise ValueError(f"inverse_root: p={p}; wants 1, 2 or 4")
    if iterations < 0:
        raise ValueError(f"inverse_root: iterations={iterations}; wants 0 or more")


def scaled_step(low, p: int):
    """(a, c) of T = a (I - c M) for a spectrum of M in [low, 1], and the next low.

    f(x) = x (1 - c x)ᵖ peaks at x = 1 / (c (p + 1)); c makes f(low) = f(1), a makes the peak 1.
    Plain arithmetic, so `low` may be a float or a tensor.
    """
    root = low ** (1 / p)
    c = 1 / sum(root**j for j in range(p + 1))
    peak = p**p / (p + 1) ** (p + 1)
    a = (c / peak) ** (1 / p)
    return a, c, c * low * (1 - c * low) ** p / peak


def _times_power(M: Tensor, T: Tensor, p: int) -> Tensor:
    """Tᵖ M, with T, a polynomial in M, spread evenly over both sides where p is even."""
    if p == 1:
        return T @ M
    half = T if p == 2 else T @ T
    return half @ M @ half
