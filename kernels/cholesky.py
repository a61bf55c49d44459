"""Dense inverse roots A^(-1/p), and the policy for a covariance that resists: raise its damping.

The factorisations run in float64, whose rounding is far below fp32's: no refinement is needed.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .deflation import deflate, deflated_condition_bound, restore
from .dispatch import Backend, choose_backend
from .gram import mirror_
from .newton_schulz import (
    inverse_root,
    newton_error,
    newton_iterations,
    probe_residual,
    upper_bound,
)

Inverse = Literal["cholesky", "newton_schulz"]

PROBE_TOLERANCE = 0.1  # a good fp32 inverse stays below up to condition numbers of 1e4 and more
DAMPING_FACTOR = 10.0
MAX_ATTEMPTS = 10
WANTED_ERROR = 1e-3  # of Newton-Schulz on a GPU; the sampling noise of Σ moves M by 1e-2 and more
BF16X3_FLOOR = 1e-7  # times the condition number: the error that bf16x3 products leave
PLAIN_BF16X3_FLOOR = 4e-6  # the same of M, for p = 1 without deflation; measured in LOG.md


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
    finite = A.isfinite().all(dim=(-2, -1))[..., None, None]
    zeroed = A.to(torch.float64, copy=True).masked_fill_(~finite, 0)  # 0 has no inverse either
    return _symmetric(*_root(zeroed, p), A.dtype)


def damped_inverse_root(
    sigma: Tensor,  # (..., d, d), symmetric positive semi-definite
    damping: Tensor,  # (...), >= 0
    p: int,
    *,
    inverse: Inverse = "cholesky",
    backend: Backend = "auto",
    condition_bound: float | None = None,
    deflation_basis: Tensor | None = None,  # (..., d, k), updated in place
) -> DampedInverse:
    """(Σ + damping I)^(-1/p) for every matrix, or an error: never a NaN, never a silent identity.

    An attempt fails where the inverse does not exist, is not finite, or leaves a probe residual
    above `PROBE_TOLERANCE`. A failed Newton-Schulz is redone by Cholesky; a failed Cholesky is
    redone with ten times the damping (at least one rounding error of the mean eigenvalue).
    Waits for the device once, and once more an attempt.

    `kernel` (kernels/dispatch.py) says who runs Newton-Schulz. `spread` is at least tr(Σ) / damping
    of every matrix, from what the caller knows; Triton's iterations and precision follow from it,
    torch's from the matrices. None: a bound is read from the device.

    `directions` deflate Newton-Schulz (kernels/deflation.py): `first_directions` to begin with, and
    kept from call to call. Triton iterates as often as leading eigenvectors ask for; where that
    leaves more than `WANTED_ERROR`, as it may for poor directions, the attempt has failed.

    Raises FloatingPointError if Σ is not finite or if `MAX_ATTEMPTS` fail, naming the matrix;
    ValueError for bad arguments.
    """
    _check_damped(sigma, damping, p, inverse)
    _check_deflation_basis(sigma, p, deflation_basis)
    batch, d = sigma.shape[:-2], sigma.shape[-1]
    flat = sigma.reshape(-1, d, d)  # (N, d, d)
    damping = damping.to(sigma.dtype).expand(batch).reshape(-1).clone()  # (N,)
    least = torch.finfo(sigma.dtype).eps * flat.diagonal(dim1=-2, dim2=-1).mean(-1)  # (N,)
    failures = torch.zeros_like(damping, dtype=torch.int64)
    if inverse == "cholesky":
        X, good = _by_cholesky(flat, damping, p)
    else:
        U = None if deflation_basis is None else deflation_basis.view(len(flat), d, -1)
        X, good = _by_newton_schulz(flat, damping, p, backend, condition_bound, U)
    attempts = 1
    while len(todo := (~good).nonzero()[:, 0]):  # waits for the device
        if attempts == MAX_ATTEMPTS:
            raise FloatingPointError(
                f"damped_inverse_root: no inverse after {MAX_ATTEMPTS} attempts for matrices "
                f"{todo.tolist()} of {len(flat)}, damping raised to {damping[todo].tolist()}; "
                "are they zero or indefinite?"
            )
        failures[todo] += 1
        if inverse == "cholesky":
            damping[todo] = torch.maximum(DAMPING_FACTOR * damping[todo], least[todo])
        inverse = "cholesky"
        X[todo], good[todo] = _by_cholesky(flat[todo], damping[todo], p)
        attempts += 1
    return DampedInverse(X.view_as(sigma), damping.view(batch), failures.view(batch))


def _by_cholesky(sigma: Tensor, damping: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """One inverse of each Σ + damping I, (n, d, d), and whether it is one, (n,)."""
    # the sum is not rounded to fp32: at small damping that would show
    X, _ = _symmetric(*_root(_damped(sigma, damping, torch.float64), p), sigma.dtype)
    return X, _is_good(_damped(sigma, damping, sigma.dtype), X, p)


def _by_newton_schulz(
    sigma: Tensor,
    damping: Tensor,
    p: int,
    backend: Backend,
    condition_bound: float | None,
    deflation_basis: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `_by_cholesky`, by Newton-Schulz; deflated if there are directions."""
    if deflation_basis is None:
        A = _damped(sigma, damping, sigma.dtype)
        floor = PLAIN_BF16X3_FLOOR if p == 1 else BF16X3_FLOOR
        X, has_converged = _iterated(A, damping, p, backend, condition_bound, floor)
        return X, has_converged & _is_good(A, X, p)
    deflated = deflate(sigma, damping, deflation_basis)
    deflation_basis.copy_(deflated.U)
    condition_bound = (
        condition_bound if condition_bound is None else deflated_condition_bound(condition_bound)
    )
    X, has_converged = _iterated(deflated.A, damping, p, backend, condition_bound, BF16X3_FLOOR)
    X = restore(X, deflated)
    return X, has_converged & _is_good(_damped(sigma, damping, sigma.dtype), X, p)


def _iterated(
    A: Tensor,
    damping: Tensor,
    p: int,
    backend: Backend,
    condition_bound: float | None,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """A^(-1/p), (n, d, d), by Newton-Schulz, and whether the iterations were enough, (n,)."""
    row_bytes = A.shape[-1] * A.element_size()
    if choose_backend(backend, "inverse root", A, row_bytes=[row_bytes]) == "triton":
        return _triton_inverse_root(A, damping, p, condition_bound, floor)
    iterations = newton_iterations(_measured_condition(A, damping), p)
    X = inverse_root(A, p, lower_bound=damping, iterations=iterations)
    return X, torch.ones_like(damping, dtype=torch.bool)


def _is_good(A: Tensor, X: Tensor, p: int) -> Tensor:
    return probe_residual(A, X, p) <= PROBE_TOLERANCE  # false where X is NaN


def _damped(sigma: Tensor, damping: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ + damping I, (n, d, d), as one copy in `dtype`."""
    A = sigma.to(dtype, copy=True)
    A.diagonal(dim1=-2, dim2=-1).add_(damping.to(dtype)[:, None])
    return A


def _measured_condition(A: Tensor, damping: Tensor) -> float:
    """A bound for the worst matrix of A; past 1/eps no number of iterations would suffice."""
    limit = 1 / torch.finfo(A.dtype).eps
    ratio = (upper_bound(A) / damping).nan_to_num(nan=limit).clamp(1, limit)
    return ratio.amax().item()  # waits for the device


def _triton_inverse_root(
    A: Tensor, damping: Tensor, p: int, condition_bound: float | None, floor: float
) -> tuple[Tensor, Tensor]:
    """As `_iterated`, by as many iterations as `spread` asks for, in bf16x3 if that is enough."""
    from ._triton_newton_schulz import inverse_root as triton_inverse_root

    if condition_bound is None:
        condition = _measured_condition(A, damping)
    else:  # ‖A‖_F <= tr(Σ) + γ̄ ‖I‖_F
        condition = min(condition_bound + math.sqrt(A.shape[-1]), 1 / torch.finfo(A.dtype).eps)
    iterations = newton_iterations(condition, p)
    precision = "bf16x3" if condition * floor <= WANTED_ERROR else "ieee"
    X = triton_inverse_root(A, p, lower_bound=damping, iterations=iterations, precision=precision)
    return X, newton_error(upper_bound(A) / damping, p, iterations) <= WANTED_ERROR


def _root(A: Tensor, p: int) -> tuple[Tensor, Tensor]:  # X (..., d, d), is_positive (...)
    """A^(-1/p) for finite A (..., d, d) in float64, and whether A is positive definite.

    By Cholesky for p = 1, else as Q diag(w^(-1/p)) Qᵀ. A is let go of as soon as it is factorised.
    """
    if p > 1:
        w, Q = torch.linalg.eigh(A)  # (..., d), (..., d, d)
        del A
        return (Q * w[..., None, :] ** (-1 / p)) @ Q.mT, w[..., 0] > 0
    L, info = torch.linalg.cholesky_ex(A)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)  # stands in for a failed factor
    del A
    is_positive = info == 0
    torch.where(is_positive[..., None, None], L, eye, out=L)
    return torch.cholesky_inverse(L), is_positive


def _symmetric(X: Tensor, is_positive: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """X in `dtype`, exactly symmetric, and whether it is a result; NaN where it is not."""
    X = mirror_(X.to(dtype, memory_format=torch.contiguous_format))
    ok = is_positive & X.isfinite().all(dim=(-2, -1))
    return X.masked_fill_(~ok[..., None, None], torch.nan), ok


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
    bad_damping = ~(damping.isfinite() & (damping >= 0))
    bad_sigma = ~sigma.isfinite().all(dim=(-2, -1)).reshape(-1)  # (N,)
    is_bad = torch.stack([bad_damping.any(), bad_sigma.any()]).tolist()  # waits for the device
    if is_bad[0]:
        raise ValueError(f"damping is {damping.tolist()}; wants finite numbers >= 0")
    if is_bad[1]:
        which = bad_sigma.nonzero()[:, 0].tolist()
        raise FloatingPointError(f"sigma is not finite in matrices {which} of {len(bad_sigma)}")


def _check_deflation_basis(sigma: Tensor, p: int, deflation_basis: Tensor | None) -> None:
    if deflation_basis is None:
        return
    if p != 1:
        raise ValueError(f"damped_inverse_root: deflation_basis with p={p}; only p = 1 is deflated")
    if deflation_basis.shape[:-1] != sigma.shape[:-1] or deflation_basis.dtype != sigma.dtype:
        raise ValueError(
            f"damped_inverse_root: deflation_basis is {tuple(deflation_basis.shape)} "
            f"{deflation_basis.dtype}; "
            f"wants {(*sigma.shape[:-1], 'k')} {sigma.dtype}, as sigma"
        )
