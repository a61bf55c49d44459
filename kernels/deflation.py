"""Deflation: the few huge eigenvalues of a covariance are kept out of its iterative inverse.

With U, k orthonormal columns near the leading eigenvectors of A = Σ + γ̄ I, and Q = I - U Uᵀ:

    A' = Q Σ Q + γ̄ I                       to be inverted; spectrum in [γ̄, γ̄ + λmax(QΣQ)]
    W = Q A U,  H = Q A'⁻¹ W
    S = UᵀAU - WᵀH                         the Schur complement, S⁻¹ = Uᵀ A⁻¹ U
    A⁻¹ = Q A'⁻¹ Q + (U - H) S⁻¹ (U - H)ᵀ

All of it holds for any U, the bounds by Cauchy's interlacing: a poor U leaves A' worse conditioned
and the result no less exact. There is no such formula for the roots of p = 2 and 4, so these are
not deflated. What has k columns is in float64. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gram import mirror_

DEFLATION_RANK = 16  # k
NARROWEST = 8 * DEFLATION_RANK  # of the matrices that are deflated
POWER_STEPS = 2  # of U towards the leading eigenvectors, at every inverse


class Deflated(NamedTuple):
    """A', and what brings A⁻¹ back from A'⁻¹."""

    A: Tensor  # (N, d, d) of Σ's dtype, exactly symmetric
    U: Tensor  # (N, d, k) float64, orthonormal
    W: Tensor  # (N, d, k) float64
    corner: Tensor  # (N, k, k) float64, UᵀAU


def first_deflation_basis(sigma: Tensor, p: int) -> Tensor | None:  # (..., d, d) -> (..., d, k)
    """U before the first inverse: like noise, the same every time. None: nothing is deflated."""
    d = sigma.shape[-1]
    if p > 1 or d < NARROWEST:
        return None
    i = torch.arange(1, d + 1, dtype=torch.float64, device=sigma.device)[:, None]
    j = torch.arange(1, DEFLATION_RANK + 1, dtype=torch.float64, device=sigma.device)
    noise = torch.cos(i.square() * (j + 0.5).sqrt())  # (d, k)
    return torch.linalg.qr(noise)[0].to(sigma.dtype).repeat(*sigma.shape[:-2], 1, 1)


def deflated_condition_bound(condition_bound: float) -> float:
    """At least ‖QΣQ‖_F / γ̄, if U are the leading eigenvectors and `spread` bounds tr(Σ) / γ̄.

    The worst Σ has n = 2k equal eigenvalues: n - k stay, of norm √(n - k) tr(Σ) / n.
    """
    return condition_bound / (2 * DEFLATION_RANK**0.5)


def deflate(sigma: Tensor, damping: Tensor, deflation_basis: Tensor) -> Deflated:
    """A' of Σ (N, d, d) and γ̄ (N,), once U (N, d, k) has made `POWER_STEPS` of block iteration."""
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
    """A⁻¹ (N, d, d) from X ≈ A'⁻¹, exactly symmetric; NaN where the Schur complement is not > 0.

    H is refined once: for a poor U, S is a small difference of large numbers.
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


def _complement(U: Tensor, Y: Tensor) -> Tensor:
    """Q Y, what of Y (N, d, m) is orthogonal to U."""
    return Y - U @ (U.mT @ Y)


def _orthonormal(Y: Tensor, otherwise: Tensor) -> Tensor:
    """An orthonormal basis of the columns of Y (N, d, k), or `otherwise` where there is none.

    By Cholesky of YᵀY, twice: of k x k matrices alone, unlike a QR decomposition. Source: Yamamoto
    et al., Roundoff error analysis of the CholeskyQR2 algorithm (2015).
    """
    Q, is_basis = Y, True
    for _ in range(2):
        L, info = torch.linalg.cholesky_ex(Q.mT @ Q)
        Q = torch.linalg.solve_triangular(L.mT, Q, upper=True, left=False)
        is_basis = (info == 0) & is_basis
    is_basis = is_basis & Q.isfinite().all(dim=(-2, -1))
    return torch.where(is_basis[:, None, None], Q, otherwise)
