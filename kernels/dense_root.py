"""Dense inverse roots A^(-1/p) by factorization.

The factorizations run in float64, so that an fp32 result needs no refinement.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spd_inverse import invert_spd_
from .symmetric import mirror_

MAX_BLOCK_CONDITION = 1e5  # beyond it, inverting in blocks loses digits that fp32 holds


def inverse_root_by_factorization(sigma: Tensor, damping: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Return (Σ + damping I)^(-1/p) (n, d, d), exactly symmetric, and whether it exists (n,).

    The damping is added in float64: rounding the sum to fp32 would distort a small damping.
    """
    if p == 1 and is_inverted_in_blocks(sigma):
        return _inverses_in_blocks(sigma, damping)
    if p == 1:
        X, is_positive = _batched_inverses(with_damping(sigma, damping, torch.float64))
    else:
        w, Q = torch.linalg.eigh(with_damping(sigma, damping, torch.float64))  # (n, d), (n, d, d)
        X, is_positive = (Q * w[..., None, :] ** (-1 / p)) @ Q.mT, w[..., 0] > 0
    return mirror_(X.to(sigma.dtype, memory_format=torch.contiguous_format)), is_positive


def is_inverted_in_blocks(sigma: Tensor) -> bool:
    """Return whether matrices on this device are inverted one by one: only on a CPU."""
    return sigma.is_cpu


def _inverses_in_blocks(sigma: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Invert one matrix after the other, in one buffer; ill-conditioned ones by LAPACK."""
    X, A = torch.empty_like(sigma), sigma.new_empty(sigma.shape[1:], dtype=torch.float64)
    is_positive = sigma.new_empty(len(sigma), dtype=torch.bool)
    for i in range(len(sigma)):
        A.copy_(sigma[i]).diagonal().add_(damping[i])
        if sigma[i].trace() <= MAX_BLOCK_CONDITION * damping[i]:  # κ <= 1 + tr(Σ) / damping
            is_positive[i] = invert_spd_(A)
            X[i] = A
        else:
            inverse, is_positive[i] = (each[0] for each in _batched_inverses(A[None]))
            X[i] = mirror_(inverse.contiguous())
    return X, is_positive


def _batched_inverses(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return A⁻¹ (n, d, d) and whether A is positive definite (n,)."""
    L, info = torch.linalg.cholesky_ex(A)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)  # replaces failed factors
    del A  # as soon as it is factorized
    is_positive = info == 0
    torch.where(is_positive[:, None, None], L, eye, out=L)
    return torch.cholesky_inverse(L), is_positive


def with_damping(sigma: Tensor, damping: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of Σ + damping I (n, d, d) in `dtype`."""
    A = sigma.to(dtype, copy=True)
    A.diagonal(dim1=-2, dim2=-1).add_(damping.to(dtype)[:, None])
    return A
