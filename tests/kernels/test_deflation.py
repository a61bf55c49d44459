"""kernels/deflation.py against dense float64 inverses, for good and poor deflation bases."""

import pytest
import torch

from optim.kernels import damped_root, deflation
from optim.kernels.damped_root import damped_inverse_root
from optim.kernels.deflation import (
    DEFLATION_RANK,
    deflate,
    deflated_condition_bound,
    first_deflation_basis,
    restore,
)
from optim.kernels.newton_schulz import newton_error, newton_iterations, upper_bound
from optim.kernels.symmetric import mirror_
from tests.kernels.spectra import exact_inverse_root, relative_error
from tests.optim.dopr.test_refresh import host_reads

D = deflation.NARROWEST


def covariance(top=0.5, *, d=D, n_top=3, decay=1.5, rank=None, seed=0, dtype=torch.float32):
    """Return Σ (d, d) with trace d and gradients G (5, d) of inputs with this covariance.

    `n_top` directions hold the fraction `top` of the trace; the other eigenvalues follow a power
    law, as measured on activations.
    """
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    rest = torch.arange(1, d - n_top + 1, dtype=torch.float64) ** -decay
    rest[(rank or d) - n_top :] = 0
    w = torch.cat([torch.full((n_top,), top / n_top), (1 - top) * rest / rest.sum()]) * d
    G = torch.randn(5, d, generator=generator, dtype=torch.float64) * w.sqrt() @ Q.mT
    return mirror_((Q * w) @ Q.mT).to(dtype), G


def random_basis(sigma, seed=1):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(sigma), DEFLATION_RANK, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(noise)[0].to(sigma.dtype)


def damped(sigma, gamma):
    return sigma.double() + gamma * torch.eye(len(sigma), dtype=torch.float64)


def deflated(sigma, gamma, U):
    """Deflate one covariance."""
    return deflate(sigma[None], torch.tensor([gamma], dtype=sigma.dtype), U[None])


def inverted(sigma, gamma, deflation_basis=None):
    """Return (Σ + γ I)⁻¹ by Newton-Schulz; Σ has trace d, so its mean eigenvalue is 1."""
    X, _, failures = damped_inverse_root(
        sigma, torch.tensor(gamma), 1, inverse="newton_schulz", deflation_basis=deflation_basis
    )
    assert not failures.any()
    return X


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("gamma", [1.0, 0.01, 1e-4])  # κ of A' + γ I: 1e2 to 1e6
def test_the_correction_is_exact_for_any_basis(steps, gamma, monkeypatch):
    monkeypatch.setattr(deflation, "POWER_STEPS", steps)
    sigma, _ = covariance(0.9, dtype=torch.float64)
    part = deflated(sigma, gamma, random_basis(sigma))
    X = restore(torch.linalg.inv(part.A), part)[0]
    exact = torch.linalg.inv(damped(sigma, gamma))
    assert relative_error(X, exact) < 1e-9  # float64 rounding times κ
    assert torch.equal(X, X.mT)


def test_the_error_of_the_iteration_is_not_amplified_by_a_poor_basis(monkeypatch):
    monkeypatch.setattr(deflation, "POWER_STEPS", 0)
    sigma, G = covariance(0.9, n_top=1, dtype=torch.float64)
    part = deflated(sigma, 0.01, random_basis(sigma))
    w, Q = torch.linalg.eigh(part.A)
    error = 1e-4 * torch.cos(torch.arange(D) ** 2)
    X = restore(mirror_((Q * ((1 + error) / w)[:, None, :]) @ Q.mT), part)[0]
    exact = G @ torch.linalg.inv(damped(sigma, 0.01))
    assert relative_error(G @ X, exact) < 1e-3  # 7e-3 without refinement


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("rank", [None, 40, 10])
def test_the_spectrum_to_invert_is_between_the_damping_and_the_bound(steps, rank, monkeypatch):
    monkeypatch.setattr(deflation, "POWER_STEPS", steps)
    sigma, _ = covariance(rank=rank, dtype=torch.float64)
    part = deflated(sigma, 0.05, random_basis(sigma))
    w = torch.linalg.eigvalsh(part.A[0])
    assert w[0] >= 0.05 * (1 - 1e-9)
    assert w[-1] <= upper_bound(part.A)[0]
    assert w[-1] <= torch.linalg.eigvalsh(damped(sigma, 0.05))[-1] * (1 + 1e-9)
    eye = torch.eye(DEFLATION_RANK, dtype=torch.float64)
    torch.testing.assert_close(part.U[0].mT @ part.U[0], eye)


@pytest.mark.parametrize("n", [20, 32, 64, D])
def test_leading_eigenvectors_leave_at_most_the_bound_that_sets_the_iterations(n):
    w = torch.zeros(D, dtype=torch.float64)
    w[:n] = D / n  # n equal eigenvalues, the worst case at n = 32
    sigma = torch.diag(w)
    part = deflated(sigma, 0.1, torch.eye(D, DEFLATION_RANK))
    remainder = part.A[0] - 0.1 * torch.eye(D)
    bound = deflated_condition_bound(D / 0.1) * 0.1
    assert remainder.norm() <= bound * (1 + 1e-6)
    if n == 2 * DEFLATION_RANK:
        assert remainder.norm() > bound * (1 - 1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("top", [0.13, 0.5, 0.95])
@pytest.mark.parametrize(("gamma", "tolerance"), [(0.2, 1e-4), (0.05, 1e-4), (0.01, 4e-4)])
def test_m_is_within_the_stated_tolerance(gamma, tolerance, top, seed):
    sigma, G = covariance(top, n_top=1 + 5 * seed, decay=0.5 + 0.5 * seed, seed=seed)
    U = first_deflation_basis(sigma, 1)
    expected = G @ exact_inverse_root(damped(sigma, gamma), 1)
    for _ in range(2):  # with the initial basis, then with the updated one
        assert relative_error(G @ inverted(sigma, gamma, U).double(), expected) < tolerance


@pytest.mark.parametrize(("top", "gamma"), [(0.95, 1e-2), (0.95, 1e-3)])
def test_m_is_better_than_without_deflation_if_one_direction_dominates(top, gamma):
    sigma, G = covariance(top, n_top=1)  # κ up to 1e5
    expected = G @ exact_inverse_root(damped(sigma, gamma), 1)
    inverses = [inverted(sigma, gamma, U) for U in (None, first_deflation_basis(sigma, 1))]
    errors = [relative_error(G @ X.double(), expected) for X in inverses]
    assert errors[1] < 1e-4
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("kind", ["random", "stale", "of another matrix"])
def test_a_poor_basis_costs_no_accuracy(kind):
    sigma, G = covariance(0.9)
    other = covariance(0.9, seed=9)[0]
    if kind == "random":
        U = random_basis(sigma)
    else:
        similar = sigma + 0.5 * other if kind == "stale" else other
        U = torch.linalg.eigh(similar)[1][:, -DEFLATION_RANK:].contiguous()
    expected = G @ exact_inverse_root(damped(sigma, 0.01), 1)
    assert relative_error(G @ inverted(sigma, 0.01, U).double(), expected) < 1e-4


def test_the_basis_finds_the_leading_eigenvectors_and_saves_iterations():
    sigma, _ = covariance(0.9)
    leading, U = torch.linalg.eigh(sigma)[1][:, -3:], first_deflation_basis(sigma, 1)
    inverted(sigma, 0.1, U)
    assert (leading - U @ (U.mT @ leading)).norm() < 1e-3
    torch.testing.assert_close(U.mT @ U, torch.eye(DEFLATION_RANK))
    part = deflated(sigma, 0.1, U)
    before, after = (
        newton_iterations((upper_bound(A) / 0.1).item(), 1) for A in (damped(sigma, 0.1), part.A)
    )
    assert after <= before - 2


@pytest.mark.parametrize("rank", [1, 5, DEFLATION_RANK, 40])
def test_rank_deficient_covariances_are_inverted(rank):
    sigma, G = covariance(rank=max(rank, 4)) if rank > 1 else covariance(1.0, n_top=1)
    expected = G @ exact_inverse_root(damped(sigma, 0.01), 1)
    X = inverted(sigma, 0.01, first_deflation_basis(sigma, 1))
    tolerance = 6e-8 * 1.3e4 if rank == 1 else 1e-4  # for rank 1, M is as small as P's rounding
    assert relative_error(G @ X.double(), expected) < tolerance


def test_a_zero_covariance_is_inverted_and_the_basis_stays_orthonormal():
    U = first_deflation_basis(torch.zeros(D, D), 1)
    X = inverted(torch.zeros(D, D), 0.5, U)
    torch.testing.assert_close(X, 2 * torch.eye(D), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(U.mT @ U, torch.eye(DEFLATION_RANK))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_does_not_matter(scale):
    sigma, G = covariance()
    U = first_deflation_basis(sigma, 1)
    settings = {"inverse": "newton_schulz", "deflation_basis": U}
    X, _, failures = damped_inverse_root(sigma * scale, torch.tensor(0.1 * scale), 1, **settings)
    expected = G @ exact_inverse_root(damped(sigma, 0.1), 1)
    assert not failures
    assert relative_error(G @ (X.double() * scale), expected) < 1e-4


def test_a_batch_of_blocks_equals_its_matrices_one_by_one():
    sigma = torch.stack([covariance(top, seed=i)[0] for i, top in enumerate((0.2, 0.9, 0.5, 0.7))])
    blocks = sigma.view(2, 2, D, D)
    U = first_deflation_basis(blocks, 1)
    X = inverted(blocks, 0.05, U).view(4, D, D)
    for i, each in enumerate(sigma):
        alone = first_deflation_basis(each, 1)
        # The batch may take more iterations than one matrix.
        assert relative_error(X[i], inverted(each, 0.05, alone)) < 1e-4
        torch.testing.assert_close(U.view(4, D, -1)[i], alone)


@pytest.mark.parametrize("bad", [-0.5 * torch.ones(D), torch.zeros(D)])
def test_a_matrix_without_an_inverse_is_redone_by_cholesky_and_the_basis_stays_finite(bad):
    sigma = torch.stack([covariance()[0], torch.diag(bad)])
    damping = torch.tensor([0.1, 0.01 if bad[0] else 0.0])
    sigma[1, 0, 0] = 1.0
    U = first_deflation_basis(sigma, 1)
    settings = {"inverse": "newton_schulz", "deflation_basis": U}
    X, used, failures = damped_inverse_root(sigma, damping, 1, **settings)
    assert failures[0] == 0 < failures[1]
    assert used[1] > damping[1]
    assert X.isfinite().all()
    assert U.isfinite().all()


def test_nothing_synchronizes_with_the_device():
    sigma, _ = covariance()
    U, damping = first_deflation_basis(sigma, 1)[None], torch.tensor([0.1])

    def work():
        part = deflate(sigma[None], damping, U)
        newton_error(upper_bound(part.A) / damping, 1, 6)
        restore(part.A, part)

    assert host_reads(work) == 0


@pytest.mark.parametrize(("d", "p"), [(D - 1, 1), (1, 1), (D, 2), (D, 4)])
def test_narrow_matrices_and_roots_are_not_deflated(d, p, monkeypatch):
    assert first_deflation_basis(torch.eye(d), p) is None
    blocks = torch.eye(D).expand(2, 3, D, D)
    assert first_deflation_basis(blocks, 1).shape == (2, 3, D, DEFLATION_RANK)
    monkeypatch.setattr(damped_root, "deflate", None)
    sigma = torch.diag(torch.linspace(0, 2, d))
    damped_inverse_root(sigma, torch.tensor(0.1), p, inverse="newton_schulz")


@pytest.mark.parametrize(
    ("p", "shape", "message"),
    [
        (2, (D, 16), "deflation_basis with p=2"),
        (1, (D - 1, 16), r"deflation_basis is \(127, 16\) torch.float32"),
        (1, (2, D, 16), r"deflation_basis is \(2, 128, 16\)"),
    ],
)
def test_a_basis_that_does_not_match_is_refused(p, shape, message):
    with pytest.raises(ValueError, match=message):
        damped_inverse_root(torch.eye(D), torch.tensor(0.1), p, deflation_basis=torch.zeros(shape))
