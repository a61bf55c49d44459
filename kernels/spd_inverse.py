"""Invert symmetric positive definite matrices on a CPU, in blocks.

LAPACK, as torch calls it, copies a wide matrix against the order of its memory several times, which
takes as long as the arithmetic. Here only blocks that fit into a cache are given to LAPACK.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .symmetric import add_symmetric_product_, mirror_

MAX_LAPACK_WIDTH = 256


def invert_spd_(A: Tensor) -> bool:  # (d, d), exactly symmetric, on the CPU
    """Replace A by its inverse, which is exactly symmetric; return whether A is positive definite.

    If it is not, A holds no meaningful values afterwards. With the Schur complement
    S = A₂₂ - A₂₁ A₁₁⁻¹ A₂₁ᵀ and V = A₂₁ A₁₁⁻¹, the inverse consists of the blocks

        X₂₂ = S⁻¹        X₂₁ = -S⁻¹ V        X₁₁ = A₁₁⁻¹ + Vᵀ S⁻¹ V

    Use float64 and a condition number of at most 1e5 or so: the error grows with its square.
    """
    d = len(A)
    if d <= MAX_LAPACK_WIDTH:
        L, info = torch.linalg.cholesky_ex(A)
        if info:
            return False
        mirror_(A.copy_(torch.cholesky_inverse(L)))
        return True
    n = d // 2
    A11, A21, A22 = A[:n, :n], A[n:, :n], A[n:, n:]
    if not invert_spd_(A11):
        return False
    V = A21 @ A11  # (d - n, n)
    add_symmetric_product_(A22, V.T, A21.T, alpha=-1)  # S
    if not invert_spd_(A22):
        return False
    torch.mm(A22, V, out=A21).neg_()
    add_symmetric_product_(A11, V, A21, alpha=-1)
    A[:n, n:] = A21.T
    return True
