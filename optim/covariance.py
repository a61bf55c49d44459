"""The mathematics of activation preconditioning, on tensors alone: Σ, its damping, M = G P.

Covariances are block-diagonal stacks (blocks, b, b) with d_in = blocks · b, dense when blocks = 1;
the covariance of one-hot inputs is a diagonal (d_in,).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.newton_schulz import full_precision


def n_blocks(d: int, widest: int | None) -> int:
    """The smallest number of equal blocks of at most `widest` that d divides into."""
    if widest is None:
        return 1
    return next(blocks for blocks in range(-(-d // widest), d + 1) if d % blocks == 0)


def ema_update(sigma: Tensor, batch: Tensor, beta: float | None, n_updates: int) -> Tensor:
    """The mean Σ after one more batch covariance; bias-corrected, so it is right from the first.

    Σ <- Σ + (1-β) / (1-βⁿ) (Σ_batch - Σ), n counting this update. β = None keeps only the batch.
    """
    if beta is None or n_updates == 1:
        return batch
    return sigma + (1 - beta) / (1 - beta**n_updates) * (batch - sigma)


def mean_eigenvalue(sigma: Tensor) -> Tensor:  # (..., blocks, b, b) -> (...); (d,) -> ()
    """tr(Σ) / d_in over all blocks."""
    if sigma.dim() == 1:
        return sigma.mean()
    return sigma.diagonal(dim1=-2, dim2=-1).mean(dim=(-2, -1))


def spread_bound(d: int, gamma: float) -> float:
    """d/γ = tr(Σ) / γ̄ over all blocks, of d features together; one block may hold it all."""
    return d / gamma if gamma else math.inf


def diagonal_inverse_root(sigma: Tensor, damping: Tensor, p: int) -> Tensor:
    """(σ + γ̄)^(-1/p) of a diagonal covariance (d_in,)."""
    return (sigma + damping) ** (-1 / p)


def precondition(G: Tensor, P: Tensor) -> Tensor:
    """M = G P for G (d_out, d_in), computed at least in fp32 whatever the matmul settings outside.

    Args:
        P: (blocks, b, b), or (d_in,) for a diagonal.
    Source: Zhang et al., arXiv 2606.06418 (activation preconditioning).
    """
    G = G.to(P.dtype)
    if P.dim() == 1:
        return G * P
    blocks, b, _ = P.shape
    with full_precision(G.device.type):
        if blocks == 1:
            return G @ P[0]
        stacked = G.view(-1, blocks, b).transpose(0, 1)  # (blocks, d_out, b)
        return torch.bmm(stacked, P).transpose(0, 1).reshape(G.shape)


def norms(M: Tensor, G: Tensor) -> Tensor:  # (2,)
    """‖M‖ and ‖G‖."""
    return torch.stack([torch.linalg.vector_norm(M), torch.linalg.vector_norm(G, dtype=M.dtype)])


def norm_ratio(norms: Tensor) -> Tensor:  # ()
    """‖M‖ / ‖G‖; 0 where G is zero."""
    return norms[0] / norms[1].clamp_min(torch.finfo(norms.dtype).tiny)


def condition_number(sigma: Tensor, damping: Tensor) -> float:
    """λmax / λmin of Σ + γ̄ I over all blocks; costs an eigendecomposition.

    Args:
        damping: γ̄, one of every block (blocks,), or one of all, () or (1,).
    """
    values = sigma if sigma.dim() == 1 else torch.linalg.eigvalsh(sigma.double())
    values = values.double() + damping.double()[..., None]  # (blocks, b)
    return float(values.max() / values.min().clamp_min(0))
