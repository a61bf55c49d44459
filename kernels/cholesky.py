"""Dense inverse roots A^(-1/p), and the policy for a covariance that resists: raise its damping.

The factorisations run in float64, whose rounding is far below fp32's: no refinement is needed.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernels.gram import mirror
from kernels.newton_schulz import inverse_root, newton_iterations, probe_residual, upper_bound

Inverse = Literal["cholesky", "newton_schulz"]

PROBE_TOLERANCE = 0.1  # a good fp32 inverse stays below up to condition numbers of 1e4 and more
DAMPING_FACTOR = 10.0
MAX_ATTEMPTS = 10


class DampedInverse(NamedTuple):
    """X = (Σ + damping I)^(-1/p), the damping it took, and how many attempts failed before."""

    X: Tensor  # (..., d, d), finite, exactly symmetric
    damping: Tensor  # (...)
    failures: Tensor  # (...) int64; 0 where the first attempt was good


def dense_inverse_root(A: Tensor, p: int) -> tuple[Tensor, Tensor]:  # X (..., d, d), ok (...)
    """A^(-1/p) by Cholesky (p = 1) or eigendecomposition (p = 2, 4), and whether it exists.

    A (..., d, d) is symmetric, fp32 or float64, and so is X, exactly. Where A is not finite or not
    positive definite, or X overflows, `ok` is false and X is NaN, which no one mistakes for a
    result.

    Raises ValueError for another p, shape or dtype.
    """
    _check_square(A, p)
    eye = torch.eye(A.shape[-1], dtype=torch.float64, device=A.device)
    finite = A.isfinite().all(dim=(-2, -1))
    A64 = torch.where(finite[..., None, None], A.double(), eye)
    X, positive = _inverse(A64, eye) if p == 1 else _inverse_root_by_eigh(A64, p)
    X = mirror(X).to(A.dtype)
    ok = finite & positive & X.isfinite().all(dim=(-2, -1))
    return torch.where(ok[..., None, None], X, torch.nan), ok


def damped_inverse_root(
    sigma: Tensor,  # (..., d, d), symmetric positive semi-definite
    damping: Tensor,  # (...), >= 0
    p: int,
    *,
    inverse: Inverse = "cholesky",
) -> DampedInverse:
    """(Σ + damping I)^(-1/p) for every matrix, or an error: never a NaN, never a silent identity.

    An attempt fails where the inverse does not exist, is not finite, or leaves a probe residual
    above `PROBE_TOLERANCE`. A failed Newton-Schulz is redone by Cholesky; a failed Cholesky is
    redone with ten times the damping (at least one rounding error of the mean eigenvalue).
    Waits for the device once an attempt.

    Raises FloatingPointError if Σ is not finite or if `MAX_ATTEMPTS` fail, naming the matrix;
    ValueError for bad arguments.
    """
    _check_damped(sigma, damping, p, inverse)
    d = sigma.shape[-1]
    flat = sigma.reshape(-1, d, d)  # (N, d, d)
    damping = damping.to(sigma.dtype).expand(sigma.shape[:-2]).reshape(-1).clone()  # (N,)
    least = torch.finfo(sigma.dtype).eps * flat.diagonal(dim1=-2, dim2=-1).mean(-1)  # (N,)
    X, failures = torch.full_like(flat, torch.nan), torch.zeros_like(damping, dtype=torch.int64)
    todo = torch.arange(len(flat), device=sigma.device)
    for _ in range(MAX_ATTEMPTS):
        X[todo], ok = _attempt(flat[todo], damping[todo], p, inverse)
        todo = todo[~ok]
        if len(todo) == 0:
            batch = sigma.shape[:-2]
            return DampedInverse(X.view_as(sigma), damping.view(batch), failures.view(batch))
        failures[todo] += 1
        if inverse == "cholesky":
            damping[todo] = torch.maximum(DAMPING_FACTOR * damping[todo], least[todo])
        inverse = "cholesky"
    raise FloatingPointError(
        f"damped_inverse_root: no inverse after {MAX_ATTEMPTS} attempts for matrices "
        f"{todo.tolist()} of {len(flat)}, damping raised to {damping[todo].tolist()}; "
        "are they zero or indefinite?"
    )


def _attempt(sigma: Tensor, damping: Tensor, p: int, inverse: Inverse) -> tuple[Tensor, Tensor]:
    """One inverse of each Σ + damping I, (n, d, d), and whether it is one, (n,)."""
    A64 = sigma.double() + torch.diag_embed(damping.double()[:, None].expand(sigma.shape[:-1]))
    A = A64.to(sigma.dtype)
    if inverse == "cholesky":  # the sum is not rounded either: at small damping that would show
        X = dense_inverse_root(A64, p)[0].to(sigma.dtype)
    else:
        X = _newton_schulz(A, damping, p)
    return X, probe_residual(A, X, p) <= PROBE_TOLERANCE  # false where X is NaN


def _newton_schulz(A: Tensor, damping: Tensor, p: int) -> Tensor:
    """A^(-1/p) in the iterations that the worst matrix needs; past 1/eps none would suffice."""
    limit = 1 / torch.finfo(A.dtype).eps
    condition = (upper_bound(A) / damping).nan_to_num(nan=limit).clamp(1, limit).amax().item()
    iterations = newton_iterations(condition, p)
    return inverse_root(A, p, lower_bound=damping, iterations=iterations)


def _inverse(A: Tensor, eye: Tensor) -> tuple[Tensor, Tensor]:
    """A⁻¹ from its Cholesky factor, and whether A is positive definite; I stands in where not."""
    L, info = torch.linalg.cholesky_ex(A)
    positive = info == 0
    return torch.cholesky_inverse(torch.where(positive[..., None, None], L, eye)), positive


def _inverse_root_by_eigh(A: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Q diag(w^(-1/p)) Qᵀ, and whether all eigenvalues w are positive."""
    w, Q = torch.linalg.eigh(A)  # (..., d), (..., d, d)
    return (Q * w[..., None, :] ** (-1 / p)) @ Q.mT, w[..., 0] > 0


def _check_square(A: Tensor, p: int) -> None:
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or A.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"inverse root: got {tuple(A.shape)} {A.dtype}; wants (..., d, d) in fp32 or float64"
        )
    if p not in (1, 2, 4):
        raise ValueError(f"inverse root: p={p}; wants 1, 2 or 4")


def _check_damped(sigma: Tensor, damping: Tensor, p: int, inverse: str) -> None:
    _check_square(sigma, p)
    if inverse not in ("cholesky", "newton_schulz"):
        raise ValueError(f"inverse={inverse!r}; use 'cholesky' or 'newton_schulz'")
    if not bool((damping.isfinite() & (damping >= 0)).all()):
        raise ValueError(f"damping is {damping.tolist()}; wants finite numbers >= 0")
    finite = sigma.isfinite().all(dim=(-2, -1)).reshape(-1)  # (N,)
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        raise FloatingPointError(f"sigma is not finite in matrices {bad} of {len(finite)}")
