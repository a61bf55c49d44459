"""The mathematics of one layer: Σ and its trace, the condition of Σ + γ̄ I, and M = G P.

    γ̄ = γ tr(Σ)/d_in
    P = (tr(Σ)/d_in)^(1/p) (Σ + γ̄ I)^(-1/p)    the first factor only if `trace_normalized`

Σ and P are block-diagonal, stored as (blocks, b, b) with blocks · b = d_in. For an embedding they
are diagonal, stored as (d_in,).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.precision import full_precision


def n_covariance_blocks(d: int, max_width: int | None) -> int:
    """Return the smallest number of equal blocks, at most `max_width` wide, that divides d."""
    if max_width is None:
        return 1
    return next(n for n in range(-(-d // max_width), d + 1) if d % n == 0)


def ema_update(sigma: Tensor, batch: Tensor, beta: float | None, n_updates: int) -> Tensor:
    """Return the bias-corrected moving average Σ, updated with the covariance `batch`.

    Σ <- Σ + (1-β) / (1-βⁿ) (Σ_batch - Σ), where Σ_batch is the covariance since the last refresh
    and n counts this update. With β = None, returns Σ_batch.
    """
    if beta is None or n_updates == 1:
        return batch
    return sigma + (1 - beta) / (1 - beta**n_updates) * (batch - sigma)


def mean_eigenvalue(sigma: Tensor) -> Tensor:  # (..., blocks, b, b) -> (...); (d,) -> ()
    """Return tr(Σ) / d_in over all blocks."""
    if sigma.dim() == 1:
        return sigma.mean()
    return sigma.diagonal(dim1=-2, dim2=-1).mean(dim=(-2, -1))


def total_mean_eigenvalue(sigma: Tensor, mean: Tensor) -> Tensor:  # ()
    """Return tr(Σ) / d_in, for Σ = C + μ μᵀ if there is a mean, else for `sigma` itself."""
    if not mean.numel():
        return mean_eigenvalue(sigma)
    return mean_eigenvalue(sigma) + mean.square().mean()


def condition_bound(d: int, gamma: float) -> float:
    """Return d/γ = tr(Σ)/γ̄, where d is the total width of the blocks.

    This is an upper bound on tr(block)/γ̄, and so on λmax(block)/γ̄, of every block of Σ.
    """
    return d / gamma if gamma else math.inf


def diagonal_inverse_root(sigma: Tensor, damping: Tensor, p: int) -> Tensor:
    """Return (σ + γ̄)^(-1/p) of a diagonal covariance σ (..., d_in)."""
    return (sigma + damping) ** (-1 / p)


def apply_P(G: Tensor, P: Tensor) -> Tensor:
    """Return M = G P for a gradient G (d_out, d_in).

    Computes in at least fp32, whatever autocast and the matmul precision are set to.

    Args:
        P: (blocks, b, b), or (d_in,) for a diagonal.
    Source: Zhang et al., arXiv 2606.06418 (activation preconditioning).
    """
    G = G.to(P.dtype)
    if P.dim() == 1:
        return G * P
    covariance_blocks, b, _ = P.shape
    with full_precision(G.device.type):
        if covariance_blocks == 1:
            return G @ P[0]
        stacked = G.view(-1, covariance_blocks, b).transpose(0, 1)  # (blocks, d_out, b)
        return torch.bmm(stacked, P).transpose(0, 1).reshape(G.shape)


def norms(M: Tensor, G: Tensor) -> Tensor:  # (2,)
    """Return ‖M‖ and ‖G‖ in at least fp32; M has the dtype of G if it came from its owner."""
    dtype = torch.promote_types(M.dtype, torch.float32)
    return torch.stack([torch.linalg.vector_norm(each, dtype=dtype) for each in (M, G)])


def norm_ratio(norms: Tensor) -> Tensor:  # ()
    """Return ‖M‖ / ‖G‖, or 0 if G is zero."""
    return norms[0] / norms[1].clamp_min(torch.finfo(norms.dtype).tiny)


def condition_number(sigma: Tensor, damping: Tensor) -> float:
    """Return λmax / λmin of Σ + γ̄ I over all blocks. This costs an eigendecomposition.

    Args:
        damping: γ̄ of each block (blocks,), or one γ̄ for all blocks, () or (1,).
    """
    values = sigma if sigma.dim() == 1 else torch.linalg.eigvalsh(sigma.double())
    values = values.double() + damping.double()[..., None]  # (blocks, b)
    return float(values.max() / values.min().clamp_min(0))


class Statistics(NamedTuple):
    """Hold what a P is computed from."""

    sigma: Tensor  # Σ, or C; (blocks, b, b), or (d,) for a diagonal
    mean_eigenvalue: Tensor  # tr(Σ) / d, (); of Σ = C + μ μᵀ with `fresh_mean`
    deflation_basis: Tensor | None  # U (blocks, b, k), the deflation basis (kernels/deflation.py)


class InverseRoot(NamedTuple):
    """Hold a layer's P and how it was computed."""

    P: Tensor  # (blocks, b, b), or (d,) for a diagonal
    damping: Tensor  # (blocks,) γ̄, larger in blocks whose inverse needed more damping
    deflation_basis: Tensor | None  # U (blocks, b, k), the deflation basis (kernels/deflation.py)
    mean_eigenvalue: Tensor  # tr(Σ) / d, ()
    n_failed: int  # number of failed attempts
    is_damped_more: bool  # whether a block needed more damping than γ asks for
