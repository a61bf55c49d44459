"""kernels/damped_root.py against dense float64 solves, and for matrices without an inverse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim.kernels import damped_root
from optim.kernels.damped_root import MAX_ATTEMPTS, damped_inverse_root
from tests.kernels.spectra import exact_inverse_root, relative_error, spd

INVERSES = ["cholesky", "newton_schulz"]
NONE = torch.zeros(())  # no damping


def covariance(d, n, seed=0):
    """Return Σ of n Gaussian inputs with features of different scales; it has rank min(n, d)."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator) * torch.logspace(0, -1, d)
    return z.mT @ z / n


def mean_eigenvalue(sigma):
    return sigma.diagonal(dim1=-2, dim2=-1).mean(-1)


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("condition", [1e2, 1e4])
@pytest.mark.parametrize(("d", "top"), [(64, None), (127, 0.5), (260, 0.95)])
def test_the_preconditioned_gradient_equals_a_float64_solve(p, condition, d, top):
    A, _ = spd(d, condition, top=top)
    G = torch.randn(24, d, generator=torch.Generator().manual_seed(1))
    X, used, failures = damped_inverse_root(A, NONE, p)
    assert used == failures == 0
    assert torch.equal(X, X.mT)
    assert relative_error(G @ X, G.double() @ exact_inverse_root(A, p)) < 1e-5


@pytest.mark.parametrize("p", [1, *(pytest.param(p, marks=pytest.mark.slow) for p in (2, 4))])
def test_the_preconditioned_gradient_equals_a_float64_solve_at_width_1024(p):
    A, _ = spd(1024, 1e4)
    G = torch.randn(24, 1024)
    X, _, _ = damped_inverse_root(A, NONE, p)
    assert relative_error(G @ X, G.double() @ exact_inverse_root(A, p)) < 1e-5


@settings(max_examples=25)
@given(
    d=st.integers(1, 45),
    n=st.integers(1, 60),
    gamma=st.sampled_from([0.01, 0.2, 1.0]),
    p=st.sampled_from([1, 2, 4]),
)
def test_ragged_and_rank_deficient_covariances_are_inverted_with_damping(d, n, gamma, p):
    sigma = covariance(d, n, seed=d)
    damping = gamma * mean_eigenvalue(sigma)
    X, used, failures = damped_inverse_root(sigma, damping, p)
    expected = exact_inverse_root(sigma.double() + damping.double() * torch.eye(d), p)
    assert relative_error(X, expected) < 1e-5
    assert torch.equal(used, damping)
    assert failures == 0


@pytest.mark.parametrize("p", [1, 2, 4])
def test_the_identity_is_its_own_inverse_root_bit_for_bit(p):
    X, used, failures = damped_inverse_root(torch.eye(37).expand(3, 37, 37), NONE, p)
    assert not used.any()
    assert not failures.any()
    assert torch.equal(X, torch.eye(37).expand(3, 37, 37))


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("power", [-80, -4, -1, 1, 8, 80])
def test_a_power_of_two_is_inverted_exactly(p, power):
    X, _, _ = damped_inverse_root(torch.eye(19) * 2.0**power, NONE, p)
    assert torch.equal(X, torch.eye(19) * torch.tensor(2 ** (-power / p)))


@pytest.mark.parametrize("p", [1, 2, 4])
def test_a_batch_equals_a_loop(p):
    sigma = torch.stack([covariance(21, n, seed=n) for n in (10, 30, 50)])
    damping = 0.1 * mean_eigenvalue(sigma)
    X, _, _ = damped_inverse_root(sigma, damping, p)
    alone = [damped_inverse_root(s, g, p).X for s, g in zip(sigma, damping, strict=True)]
    assert torch.equal(X, torch.stack(alone))


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("p", [1, 2, 4])
def test_both_inverses_agree(inverse, p):
    sigma = torch.stack([covariance(40, 25), covariance(40, 400)])
    damping = 0.2 * mean_eigenvalue(sigma)
    X, _, failures = damped_inverse_root(sigma, damping, p, inverse=inverse)
    A = sigma.double() + damping.double()[:, None, None] * torch.eye(40)
    assert relative_error(X, exact_inverse_root(A, p)) < 1e-3
    assert torch.equal(X, X.mT)
    assert not failures.any()


@pytest.mark.parametrize("inverse", INVERSES)
def test_an_indefinite_covariance_gets_ten_times_its_damping_until_it_has_an_inverse(inverse):
    sigma = torch.stack([torch.eye(6), torch.diag(torch.tensor([-0.5, 1, 1, 1, 1, 1]))])
    X, used, failures = damped_inverse_root(sigma, torch.tensor([0.01, 0.01]), 1, inverse=inverse)
    torch.testing.assert_close(used, torch.tensor([0.01, 1.0]))
    assert failures.tolist() == [0, 2 if inverse == "cholesky" else 3]
    expected = exact_inverse_root(sigma[1] + torch.eye(6), 1)
    assert relative_error(X[1], expected) < 1e-5


def test_a_failed_newton_schulz_is_redone_by_cholesky_with_the_same_damping():
    sigma = covariance(40, 3)
    damping = torch.tensor(1e-6)  # too small for Newton-Schulz in fp32
    X, used, failures = damped_inverse_root(sigma, damping, 1, inverse="newton_schulz")
    assert failures == 1
    assert used == damping
    assert torch.equal(X, damped_inverse_root(sigma, damping, 1).X)


@pytest.mark.parametrize("inverse", INVERSES)
def test_a_singular_covariance_without_damping_gets_some(inverse):
    sigma = covariance(20, 5)
    X, used, failures = damped_inverse_root(sigma, torch.zeros(()), 1, inverse=inverse)
    assert X.isfinite().all()
    assert 0 < used < 1e-2 * mean_eigenvalue(sigma)
    assert failures > 0


@pytest.mark.parametrize("inverse", INVERSES)
def test_dead_features_are_finite(inverse):
    sigma = covariance(16, 40)
    sigma[3], sigma[:, 3] = 0, 0
    damping = 0.05 * mean_eigenvalue(sigma)
    X, _, failures = damped_inverse_root(sigma, damping, 1, inverse=inverse)
    assert failures == 0
    torch.testing.assert_close(X[3, 3], 1 / damping, rtol=1e-4, atol=0)


@pytest.mark.parametrize("inverse", INVERSES)
def test_a_covariance_that_never_has_an_inverse_is_an_error_that_names_it(inverse):
    sigma = torch.stack([torch.eye(5), torch.zeros(5, 5), torch.eye(5)])
    with pytest.raises(FloatingPointError, match=rf"{MAX_ATTEMPTS} attempts for matrices \[1\] of"):
        damped_inverse_root(sigma, torch.tensor([0.1, 0.0, 0.1]), 1, inverse=inverse)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_covariance_that_is_not_finite_is_an_error_that_names_it(value):
    sigma = torch.eye(4).repeat(3, 1, 1)
    sigma[2, 0, 1] = value
    with pytest.raises(FloatingPointError, match=r"not finite in matrices \[2\] of 3"):
        damped_inverse_root(sigma, torch.full((3,), 0.1), 1)


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_activations_are_inverted(inverse, scale):
    sigma = covariance(16, 40) * scale
    X, _, failures = damped_inverse_root(sigma, 0.1 * mean_eigenvalue(sigma), 1, inverse=inverse)
    A = sigma.double() + 0.1 * mean_eigenvalue(sigma).double() * torch.eye(16)
    assert failures == 0
    assert relative_error(X.double() * scale, exact_inverse_root(A, 1) * scale) < 1e-4


def test_a_wrong_inverse_does_not_pass_for_a_right_one(monkeypatch):
    def wrong(A, p, **_):
        return torch.eye(A.shape[-1]).expand_as(A)

    monkeypatch.setattr(damped_root, "inverse_root", wrong)
    sigma = covariance(16, 40)
    X, _, failures = damped_inverse_root(
        sigma, 0.1 * mean_eigenvalue(sigma), 1, inverse="newton_schulz"
    )
    assert failures == 1
    assert torch.equal(X, damped_inverse_root(sigma, 0.1 * mean_eigenvalue(sigma), 1).X)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: damped_inverse_root(torch.ones(2, 3), NONE, 1), r"\(2, 3\)"),
        (lambda: damped_inverse_root(torch.eye(2).bfloat16(), NONE, 1), "bfloat16"),
        (lambda: damped_inverse_root(torch.eye(2), NONE, 3), "p=3"),
        (lambda: damped_inverse_root(torch.eye(2), torch.tensor(-1.0), 1), "damping"),
        (lambda: damped_inverse_root(torch.eye(2), torch.tensor(torch.nan), 1), "damping"),
        (lambda: damped_inverse_root(torch.eye(2), torch.ones(()), 1, inverse="qr"), "'qr'"),
    ],
)
def test_bad_arguments_are_refused_by_name(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()


@pytest.mark.parametrize("gamma", [1e-6, 1e-8])
def test_a_small_damping_of_a_wide_rank_deficient_covariance_is_kept(gamma):
    """Inverting in blocks would lose these matrices (kernels/dense_root.py)."""
    z = torch.randn(80, 600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = z.mT @ z / 80
    damping = gamma * mean_eigenvalue(sigma)
    X, used, failures = damped_inverse_root(sigma, damping, 1)
    assert failures == 0
    assert torch.equal(used, damping)
    exact = torch.linalg.inv(sigma + damping * torch.eye(600, dtype=torch.float64))
    assert relative_error(X, exact) < 1e-15 * 600 / gamma
