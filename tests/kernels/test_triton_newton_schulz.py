"""kernels/_triton_newton_schulz.py against its reference, on a GPU or in Triton's interpreter."""

import pytest
import torch

from optim.kernels import newton_schulz
from optim.kernels.newton_schulz import newton_iterations, probe_residual, upper_bound
from tests.kernels.spectra import exact_inverse_root, relative_error, spd
from tests.kernels.triton_device import DEVICE, randn, triton_newton_schulz

pytestmark = pytest.mark.usefixtures("poisoned")
inverse_root, orthogonalize = triton_newton_schulz.inverse_root, triton_newton_schulz.orthogonalize

# Error floors at condition number κ = 1e3: bf16x3 1e-7 κ, or twice that if bf16 is truncated; tf32
# 8e-6 κ; ieee the tolerance of `newton_iterations`.
TOLERANCE = {"ieee": 1e-4, "bf16x3": 1e-3, "tf32": 2e-2}


def covariances(d, conditions):
    """Return A (N, d, d), its smallest eigenvalues (N,) and a bound on the condition numbers."""
    pairs = [spd(d, condition, top=0.4, seed=i) for i, condition in enumerate(conditions)]
    A = torch.stack([a for a, _ in pairs]).to(DEVICE)
    lower = torch.tensor([low for _, low in pairs], device=DEVICE)
    return A, lower, (upper_bound(A) / lower).amax().item()


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("p", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_batch_of_inverse_roots_equals_float64(p, precision):
    A, lower, condition = covariances(31, [1e3, 30])
    iterations = newton_iterations(condition, p)
    X = inverse_root(A, p, lower_bound=lower, iterations=iterations, precision=precision)
    assert relative_error(X[0], exact_inverse_root(A[0], p)) < TOLERANCE[precision]
    assert relative_error(X[1], exact_inverse_root(A[1], p)) < TOLERANCE[precision]
    assert torch.equal(X, X.mT)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_the_iterates_are_those_of_the_reference(p):
    A, lower, _ = covariances(20, [100, 10])
    for iterations in (0, 1, 3):  # far from converged
        arguments = {"lower_bound": lower[None], "iterations": iterations}
        X = inverse_root(A[None], p, **arguments, precision="ieee")
        expected = newton_schulz.inverse_root(A[None], p, **arguments)
        assert X.shape == expected.shape
        assert relative_error(X, expected) < 1e-6  # fp32 rounding


def test_one_bound_serves_all_and_the_same_bits_come_every_time():
    A, lower, condition = covariances(20, [50, 40])
    least, iterations = lower.amin().item(), newton_iterations(2 * condition, 1)
    X = inverse_root(A, 1, lower_bound=least, iterations=iterations)
    assert torch.equal(inverse_root(A, 1, lower_bound=least, iterations=iterations), X)
    assert (probe_residual(A, A.new_zeros(len(A)), X, 1) < 1e-3).all()


@pytest.mark.parametrize("ns_coefficients", ["quintic", "polar_express"])
@pytest.mark.parametrize("shape", [(2, 20, 33), (33, 20), (17, 17), (2, 2, 1, 5)])
def test_orthogonalize_equals_the_reference_in_fp32(shape, ns_coefficients):
    G = randn(*shape)
    arguments = {"steps": 3, "ns_coefficients": ns_coefficients, "dtype": torch.float32}
    got, expected = orthogonalize(G, **arguments), newton_schulz.orthogonalize(G, **arguments)
    assert relative_error(got, expected) < 1e-5  # fp32 rounding, amplified by the polynomials
    assert got.shape == G.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_singular_values_end_near_one(dtype):
    G = torch.diag(torch.logspace(0, -2, 24)).flip(1).to(DEVICE, dtype)
    got = orthogonalize(G)
    assert got.dtype == dtype
    # With exact products, five steps of polar_express give 0.84 to 1.13; bf16 widens this band.
    sigma = torch.linalg.svdvals(got.double())
    assert sigma.min() > 0.75
    assert sigma.max() < 1.25


def test_zero_matrices_give_zeros():
    assert not orthogonalize(torch.zeros(2, 5, 8, device=DEVICE), steps=2).any()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # a prototype feature
@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU runs asynchronously")
def test_nothing_synchronizes_with_the_device():
    A, lower, _ = covariances(64, [1e2, 1e3])
    try:
        torch.cuda.set_sync_debug_mode("error")
        for p in (1, 2, 4):
            inverse_root(A, p, lower_bound=lower, iterations=8)
            inverse_root(A, p, lower_bound=0.1, iterations=8)
        orthogonalize(A)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: orthogonalize(torch.ones(3)), "expected a floating"),
        (lambda: orthogonalize(torch.ones(3, 3), dtype=torch.float64), "float64"),
        (lambda: inverse_root(torch.ones(3, 2), 1, lower_bound=1.0, iterations=1), r"\(3, 2\)"),
        (lambda: inverse_root(torch.eye(3).double(), 1, lower_bound=1.0, iterations=1), "float64"),
        (lambda: inverse_root(torch.eye(3), 3, lower_bound=1.0, iterations=1), "p=3"),
        (lambda: inverse_root(torch.eye(3), 1, lower_bound=1.0, iterations=-1), "iterations=-1"),
        (
            lambda: inverse_root(torch.eye(3), 1, lower_bound=1.0, iterations=1, precision="bf16"),
            "precision='bf16'",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()
