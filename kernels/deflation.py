"""Deflation: remove the few largest eigenvalues of a covariance before inverting it iteratively.

Let U hold k orthonormal columns near the leading eigenvectors of A = Σ + γ̄ I, and Q = I - U Uᵀ:

    A' = Q Σ Q + γ̄ I                       the matrix to invert, spectrum in [γ̄, γ̄ + λmax(QΣQ)]
    W = Q A U,  H = Q A'⁻¹ W
    S = UᵀAU - WᵀH                         the Schur complement, S⁻¹ = Uᵀ A⁻¹ U
    A⁻¹ = Q A'⁻¹ Q + (U - H) S⁻¹ (U - H)ᵀ

These formulas are exact for any U; the bounds follow from Cauchy's interlacing theorem. A poor U
makes A' worse conditioned but the result no less exact. No such formula exists for p = 2 and 4,
so these roots are not deflated. Matrices with k columns are in float64. Nothing here synchronizes
with the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .symmetric import mirror_

DEFLATION_RANK = 16  # k
NARROWEST = 8 * DEFLATION_RANK  # the smallest d of a matrix that is deflated
POWER_STEPS = 2  # steps of block power iteration on U per inverse


class Deflated(NamedTuple):
    """The deflated matrix A' and the factors that `restore` needs to compute A⁻¹ from A'⁻¹."""

    A: Tensor  # A' (N, d, d) in Σ's dtype, exactly symmetric
    U: Tensor  # (N, d, k) float64, orthonormal
    W: Tensor  # (N, d, k) float64
    corner: Tensor  # (N, k, k) float64, UᵀAU


def first_deflation_basis(sigma: Tensor, p: int) -> Tensor | None:  # (..., d, d) -> (..., d, k)
    """Return U for the first inverse, deterministic pseudo-noise, or None if Σ is not deflated."""
    d = sigma.shape[-1]
    if p > 1 or d < NARROWEST:
        return None
    i = torch.arange(1, d + 1, dtype=torch.float64, device=sigma.device)[:, None]
    j = torch.arange(1, DEFLATION_RANK + 1, dtype=torch.float64, device=sigma.device)
    noise = torch.cos(i.square() * (j + 0.5).sqrt())  # (d, k)
    return torch.linalg.qr(noise)[0].to(sigma.dtype).repeat(*sigma.shape[:-2], 1, 1)


def deflated_condition_bound(condition_bound: float) -> float:
    """Return an upper bound on ‖QΣQ‖_F / γ̄, where `condition_bound` bounds tr(Σ) / γ̄.

    The bound holds if U are the leading eigenvectors. In the worst case, Σ has n = 2k equal
    eigenvalues; n - k of them remain, with the norm √(n - k) tr(Σ) / n.
    """
    return condition_bound / (2 * DEFLATION_RANK**0.5)


def deflate(sigma: Tensor, damping: Tensor, deflation_basis: Tensor) -> Deflated:
    """Improve U (N, d, k) by power iteration, then deflate A = Σ + γ̄ I for Σ (N, d, d), γ̄ (N,)."""
    A = sigma.to(torch.float64, copy=True)
    A.diagonal(dim1=-2, dim2=-1).add_(damping[:, None])
    U = deflation_basis.to(torch.float64)
    for _ in range(POWER_STEPS):
        U = _orthonormal(A @ U, U)
    AU = A @ U
    corner = U.mT @ AU
    W = AU - U @ corner
    # A' = A - U Zᵀ - Z Uᵀ with Z = A U - U (UᵀAU + γ̄ I) / 2, and A U = W + U UᵀAU
    Z = W + U @ (corner - torch.diag_embed(damping.double()[:, None].expand(-1, U.shape[-1]))) / 2
    A.baddbmm_(torch.cat([U, Z], -1), torch.cat([Z, U], -1).mT, alpha=-1)
    return Deflated(mirror_(A.to(sigma.dtype)), U, W, corner)


def restore(X: Tensor, deflated: Deflated) -> Tensor:
    """Compute A⁻¹ (N, d, d), exactly symmetric, from X ≈ A'⁻¹.

    A⁻¹ is NaN where the Schur complement is not positive definite. H is refined once because S is a
    small difference of large numbers for a poor U.
    """
    A, U, W, corner = deflated
    H = _complement(U, X.double() @ W)
    H += _complement(U, X.double() @ _complement(U, W - A.double() @ H))
    L, info = torch.linalg.cholesky_ex(corner - W.mT @ H)
    F = torch.linalg.solve_triangular(L.mT, U - H, upper=True, left=False)  # F Fᵀ is the last term
    F.masked_fill_((info != 0)[:, None, None], torch.nan)
    # Q X Q = X - U Rᵀ - R Uᵀ with R = X U - U (Uᵀ X U) / 2
    full = X.to(torch.float64, copy=True)
    XU = full @ U
    R = XU - U @ (U.mT @ XU) / 2
    full.baddbmm_(torch.cat([F, U, R], -1), torch.cat([F, -R, -U], -1).mT)
    return mirror_(full.to(X.dtype))


def check_deflation_basis(sigma: Tensor, p: int, deflation_basis: Tensor | None) -> None:
    """Raise ValueError if the deflation basis does not match Σ, or if `p` is not 1."""
    if deflation_basis is None:
        return
    if p != 1:
        raise ValueError(f"deflation_basis with p={p}: only p=1 supports deflation")
    if deflation_basis.shape[:-1] != sigma.shape[:-1] or deflation_basis.dtype != sigma.dtype:
        raise ValueError(
            f"deflation_basis is {tuple(deflation_basis.shape)} {deflation_basis.dtype}; "
            f"expected {(*sigma.shape[:-1], 'k')} {sigma.dtype} like sigma"
        )


def _complement(U: Tensor, Y: Tensor) -> Tensor:
    """Return Q Y, the part of Y (N, d, m) that is orthogonal to U."""
    return Y - U @ (U.mT @ Y)


def _orthonormal(Y: Tensor, fallback: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns of Y (N, d, k), or `fallback` where it fails.

    CholeskyQR2: unlike a QR decomposition, it factorizes k x k matrices only. Source: Yamamoto et
    al., Roundoff error analysis of the CholeskyQR2 algorithm (2015).
    """
    Q, is_basis = Y, True
    for _ in range(2):
        L, info = torch.linalg.cholesky_ex(Q.mT @ Q)
        Q = torch.linalg.solve_triangular(L.mT, Q, upper=True, left=False)
        is_basis = (info == 0) & is_basis
    is_basis = is_basis & Q.isfinite().all(dim=(-2, -1))
    return torch.where(is_basis[:, None, None], Q, fallback)
