"""Deflated inverses by the Triton kernels, on a GPU or in Triton's interpreter."""

import pytest
import torch

from optim.kernels import damped_root
from optim.kernels.damped_root import WANTED_ERROR, damped_inverse_root
from optim.kernels.deflation import DEFLATION_RANK, first_deflation_basis
from tests.kernels.spectra import exact_inverse_root, relative_error
from tests.kernels.test_deflation import D, covariance, damped
from tests.kernels.triton_device import DEVICE, triton_newton_schulz

pytestmark = pytest.mark.slow  # an option of Newton-Schulz that waits for a GPU


@pytest.fixture
def launches(monkeypatch):
    """Record (iterations, precision) of every inverse; fail if a bound is read from the device."""
    seen, inverse_root = [], triton_newton_schulz.inverse_root

    def recorded(*args, **kwargs):
        seen.append((kwargs["iterations"], kwargs["precision"]))
        return inverse_root(*args, **kwargs)

    monkeypatch.setattr(triton_newton_schulz, "inverse_root", recorded)
    monkeypatch.setattr(damped_root, "_measured_condition", None)
    return seen


def by_triton(sigma, gamma, deflation_basis=None, condition_bound=None):
    return damped_inverse_root(
        *(sigma.to(DEVICE), torch.tensor(gamma, device=DEVICE), 1),
        **{
            "inverse": "newton_schulz",
            "backend": "triton",
            "condition_bound": condition_bound or D / gamma,
        },
        deflation_basis=deflation_basis,
    )


# The iterations leave an error of 1e-4. bf16x3 products leave about 1e-6 times the condition number
# of A' in the interpreter, which truncates.
@pytest.mark.parametrize(("gamma", "tolerance"), [(0.1, 3e-4), (0.01, 1e-3)])
def test_m_equals_float64_from_the_first_inverse_on(gamma, tolerance, launches):
    U = first_deflation_basis(torch.zeros(D, D, device=DEVICE), 1)
    for seed in (0, 1):  # the second covariance starts from the basis of the first
        sigma, G = covariance((0.5, 0.95)[seed], seed=seed)
        X, _, failures = by_triton(sigma, gamma, U)
        assert failures == 0
        assert torch.equal(X, X.mT)
        expected = G @ exact_inverse_root(damped(sigma, gamma), 1)
        assert relative_error(G @ X.cpu().double(), expected) < tolerance
    assert launches[0] == launches[1]


def test_iterations_and_precision_follow_from_the_bound_alone(launches):
    by_triton(covariance(0.9)[0], 0.1)
    for top, gamma in ((0.1, 0.1), (0.9, 0.1), (0.9, 0.01)):
        sigma, _ = covariance(top)
        by_triton(sigma, gamma, first_deflation_basis(sigma.to(DEVICE), 1))
    plain, *deflated = launches
    assert plain == (8, "ieee")  # bf16x3 up to a condition of 250
    assert deflated == [(7, "bf16x3"), (7, "bf16x3"), (8, "bf16x3")]


@pytest.mark.parametrize("gamma", [2.0, 0.1, 0.05])
def test_m_of_narrow_inputs_which_are_not_deflated_is_within_the_wanted_error(gamma, launches):
    for seed in range(3):
        sigma, G = covariance(0.9, d=64, n_top=1, seed=seed)
        X, _, failures = by_triton(sigma, gamma, condition_bound=64 / gamma)
        assert failures == 0
        expected = G @ exact_inverse_root(damped(sigma, gamma), 1)
        assert relative_error(G @ X.cpu().double(), expected) < WANTED_ERROR
    assert {precision for _, precision in launches} == {"bf16x3" if gamma == 2 else "ieee"}


def test_too_few_iterations_are_found_out_and_redone_by_cholesky(launches):
    sigma, _ = covariance(0.9, n_top=60, decay=0.1)  # U captures at most a third of the trace
    U = first_deflation_basis(sigma.to(DEVICE), 1)
    X, _, failures = by_triton(sigma, 0.01, U, condition_bound=100.0)
    assert len(launches) == failures == 1
    assert relative_error(X.cpu(), exact_inverse_root(damped(sigma, 0.01), 1)) < 1e-5
    assert U.shape == (D, DEFLATION_RANK)


def test_what_converges_too_little_for_the_wanted_error_would_pass_the_probe(launches, monkeypatch):
    monkeypatch.setattr(damped_root, "WANTED_ERROR", 1.0)
    sigma, _ = covariance(0.9, n_top=60, decay=0.1)
    X, _, failures = by_triton(
        sigma, 0.01, first_deflation_basis(sigma.to(DEVICE), 1), condition_bound=1000.0
    )
    assert failures == 0  # the probe does not detect it; only the error bound does
    assert relative_error(X.cpu(), exact_inverse_root(damped(sigma, 0.01), 1)) > WANTED_ERROR
