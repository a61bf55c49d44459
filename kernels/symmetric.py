"""Compute matrix products that are symmetric: the lower triangle only, then a copy of it.

torch has no `syrk`. A product in strips of rows, each up to the diagonal, needs little more than
half of the multiplications of a full product.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_STRIP = 128  # narrower strips multiply too slowly
MAX_STRIPS = 8  # more strips save little: n strips cost (n + 1) / 2n of a full product


def mirror_(Y: Tensor) -> Tensor:  # (..., d, d), updated in place
    """Copy the lower triangle onto the upper one, which makes Y exactly symmetric."""
    return Y.tril_().add_(Y.tril(-1).mT)


def add_symmetric_product_(
    S: Tensor,  # (d, d), symmetric, updated in place
    A: Tensor,  # (n, d)
    B: Tensor,  # (n, d), such that Aᵀ B is symmetric
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> None:
    """Update S <- β S + α Aᵀ B in place. S stays exactly symmetric.

    S may be a part of a larger matrix. It must not share memory with A and B.
    """
    d = len(S)
    width = max(MIN_STRIP, -(-d // MAX_STRIPS))
    for first in range(0, d, width):
        last = min(first + width, d)
        strip = S[first:last, :last]
        torch.addmm(strip, A[:, first:last].T, B[:, :last], beta=beta, alpha=alpha, out=strip)
        mirror_(S[first:last, first:last])
        S[:first, first:last] = S[first:last, :first].T
