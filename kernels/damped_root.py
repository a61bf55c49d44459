"""Inverse roots of damped covariances, with a retry at a larger damping where there is none."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .deflation import check_deflation_basis, deflate, deflated_condition_bound, restore
from .dense_root import inverse_root_by_factorization, with_damping
from .dispatch import Backend, choose_backend
from .newton_schulz import (
    check_inverse_root,
    inverse_root,
    newton_error,
    newton_iterations,
    probe_residual,
    upper_bound,
)

Inverse = Literal["cholesky", "newton_schulz"]

PROBE_TOLERANCE = 0.1  # accurate fp32 inverses stay below it for condition numbers of 1e4 and more
DAMPING_FACTOR = 10.0
MAX_ATTEMPTS = 10
WANTED_ERROR = 1e-3  # of Newton-Schulz on a GPU; the sampling noise of Σ changes M by 1e-2 or more
BF16X3_FLOOR = 1e-7  # error of bf16x3 products, relative to the condition number
PLAIN_BF16X3_FLOOR = 4e-6  # the same for p = 1 without deflation, measured on M


class DampedInverse(NamedTuple):
    """The result of `damped_inverse_root`: X = (Σ + damping I)^(-1/p)."""

    X: Tensor  # (..., d, d), finite, exactly symmetric
    damping: Tensor  # (...), the damping of the attempt that succeeded
    failures: Tensor  # (...) int64, the number of failed attempts


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
    """Compute (Σ + damping I)^(-1/p) for every matrix; raise an error instead of returning NaN.

    An attempt fails if the inverse does not exist, is not finite, or leaves a probe residual above
    `PROBE_TOLERANCE`. A failed Newton-Schulz iteration is redone by Cholesky; a failed Cholesky,
    with ten times the damping (at least one rounding error of the mean eigenvalue). Synchronizes
    with the device once to check the arguments and once per attempt.

    Args:
        inverse: "newton_schulz", or "cholesky", which for p = 2 and 4 is an eigendecomposition.
        backend: the implementation of Newton-Schulz; see `dispatch.choose_backend`.
        condition_bound: an upper bound on tr(Σ) / damping of every matrix, from which the Triton
            kernel derives its iterations and precision. If None, a bound is read from the device.
            The torch reference always reads one.
        deflation_basis: the basis that deflates Newton-Schulz (deflation.py): create it with
            `first_deflation_basis` and pass it to every call. The number of Triton iterations
            assumes a basis near the leading eigenvectors; an attempt fails if they leave an error
            above `WANTED_ERROR`.

    Raises:
        FloatingPointError: Σ is not finite, or `MAX_ATTEMPTS` attempts failed for some matrix.
        ValueError: an argument is invalid.
    """
    _check_damped(sigma, damping, p, inverse)
    check_deflation_basis(sigma, p, deflation_basis)
    batch, d = sigma.shape[:-2], sigma.shape[-1]
    flat = sigma.reshape(-1, d, d)  # (N, d, d)
    damping = damping.to(sigma.dtype).expand(batch).reshape(-1).clone()  # (N,)
    if inverse == "cholesky":
        X, is_good = _by_cholesky(flat, damping, p)
    else:
        U = None if deflation_basis is None else deflation_basis.view(len(flat), d, -1)
        X, is_good = _by_newton_schulz(flat, damping, p, backend, condition_bound, U)
    failures = _redo_failures_(X, is_good, flat, damping, p, inverse)
    return DampedInverse(X.view_as(sigma), damping.view(batch), failures.view(batch))


def _redo_failures_(
    X: Tensor,  # (N, d, d), updated in place
    is_good: Tensor,  # (N,), updated in place
    sigma: Tensor,  # (N, d, d)
    damping: Tensor,  # (N,), updated in place
    p: int,
    inverse: Inverse,  # the method of the first attempt
) -> Tensor:  # (N,) int64
    """Redo failed inverses by Cholesky until all are good; return the number of failures."""
    min_damping = torch.finfo(sigma.dtype).eps * sigma.diagonal(dim1=-2, dim2=-1).mean(-1)  # (N,)
    failures = torch.zeros_like(damping, dtype=torch.int64)
    attempts = 1
    while len(failed := (~is_good).nonzero()[:, 0]):  # synchronizes
        if attempts == MAX_ATTEMPTS:
            raise FloatingPointError(
                f"damped_inverse_root: no inverse after {MAX_ATTEMPTS} attempts for matrices "
                f"{failed.tolist()} of {len(sigma)}, with the damping raised to "
                f"{damping[failed].tolist()}; check whether they are zero or indefinite"
            )
        failures[failed] += 1
        if inverse == "cholesky":
            raised = DAMPING_FACTOR * damping[failed]
            damping[failed] = torch.maximum(raised, min_damping[failed])
        inverse = "cholesky"
        X[failed], is_good[failed] = _by_cholesky(sigma[failed], damping[failed], p)
        attempts += 1
    return failures


def _by_cholesky(sigma: Tensor, damping: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Return the inverse root of each Σ + damping I (n, d, d) and whether it is good (n,)."""
    X, is_positive = inverse_root_by_factorization(sigma, damping, p)
    return X, is_positive & _is_good(sigma, damping, X, p)


def _by_newton_schulz(
    sigma: Tensor,
    damping: Tensor,
    p: int,
    backend: Backend,
    condition_bound: float | None,
    deflation_basis: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Like `_by_cholesky`, by Newton-Schulz. `deflation_basis` (n, d, k) is updated in place."""
    if deflation_basis is None:
        A = with_damping(sigma, damping, sigma.dtype)
        floor = PLAIN_BF16X3_FLOOR if p == 1 else BF16X3_FLOOR
        X, has_converged = _iterate(A, damping, p, backend, condition_bound, floor)
        return X, has_converged & _is_good(sigma, damping, X, p)
    deflated = deflate(sigma, damping, deflation_basis)
    deflation_basis.copy_(deflated.U)
    if condition_bound is not None:
        condition_bound = deflated_condition_bound(condition_bound)
    X, has_converged = _iterate(deflated.A, damping, p, backend, condition_bound, BF16X3_FLOOR)
    X = restore(X, deflated)
    return X, has_converged & _is_good(sigma, damping, X, p)


def _iterate(
    A: Tensor,
    damping: Tensor,
    p: int,
    backend: Backend,
    condition_bound: float | None,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Return A^(-1/p) (n, d, d) by Newton-Schulz and whether it has converged (n,)."""
    row_bytes = A.shape[-1] * A.element_size()
    if choose_backend(backend, "inverse root", A, row_bytes=[row_bytes]) == "triton":
        return _triton_inverse_root(A, damping, p, condition_bound, floor)
    iterations = newton_iterations(_measured_condition(A, damping), p)
    X = inverse_root(A, p, lower_bound=damping, iterations=iterations)
    return X, torch.ones_like(damping, dtype=torch.bool)


def _is_good(sigma: Tensor, damping: Tensor, X: Tensor, p: int) -> Tensor:
    # false if any element of X is not finite
    return probe_residual(sigma, damping, X, p) <= PROBE_TOLERANCE


def _measured_condition(A: Tensor, damping: Tensor) -> float:
    """Return an upper bound on the largest condition number, at most 1/eps of the dtype."""
    limit = 1 / torch.finfo(A.dtype).eps
    ratio = (upper_bound(A) / damping).nan_to_num(nan=limit).clamp(1, limit)
    return ratio.amax().item()  # synchronizes


def _triton_inverse_root(
    A: Tensor, damping: Tensor, p: int, condition_bound: float | None, floor: float
) -> tuple[Tensor, Tensor]:
    """Like `_iterate`; iterations and precision follow from `condition_bound` and `floor`."""
    from ._triton_newton_schulz import inverse_root as triton_inverse_root

    if condition_bound is None:
        condition = _measured_condition(A, damping)
    else:  # ‖A‖_F <= tr(Σ) + γ̄ ‖I‖_F
        condition = min(condition_bound + math.sqrt(A.shape[-1]), 1 / torch.finfo(A.dtype).eps)
    iterations = newton_iterations(condition, p)
    precision = "bf16x3" if condition * floor <= WANTED_ERROR else "ieee"
    X = triton_inverse_root(A, p, lower_bound=damping, iterations=iterations, precision=precision)
    return X, newton_error(upper_bound(A) / damping, p, iterations) <= WANTED_ERROR


def _check_damped(sigma: Tensor, damping: Tensor, p: int, inverse: str) -> None:
    check_inverse_root(sigma, p)
    if inverse not in ("cholesky", "newton_schulz"):
        raise ValueError(f"inverse={inverse!r}: must be 'cholesky' or 'newton_schulz'")
    bad_damping = ~(damping.isfinite() & (damping >= 0))
    flat = sigma.reshape(-1, sigma.shape[-1] ** 2)  # (N, d d)
    extremes = torch.stack([flat.amax(1), flat.amin(1)])  # (2, N), faster than to test each element
    bad_sigma = ~extremes.isfinite().all(0)  # (N,)
    is_bad = torch.stack([bad_damping.any(), bad_sigma.any()]).tolist()  # synchronizes
    if is_bad[0]:
        raise ValueError(f"damping is {damping.tolist()}: must be finite and at least 0")
    if is_bad[1]:
        indices = bad_sigma.nonzero()[:, 0].tolist()
        raise FloatingPointError(f"sigma is not finite in matrices {indices} of {len(bad_sigma)}")
