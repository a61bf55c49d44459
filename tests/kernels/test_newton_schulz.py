"""kernels/newton_schulz.py against torch.optim.Muon, the SVD and dense float64 inverse roots."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim._muon import _zeropower_via_newtonschulz

from optim.kernels.newton_schulz import (
    QUINTIC,
    full_precision,
    inverse_root,
    newton_error,
    newton_iterations,
    orthogonalize,
    probe_residual,
    upper_bound,
)
from tests.kernels.spectra import exact_inverse_root, relative_error, spd

TOPS = [None, 0.13, 0.5, 0.95]  # for real activations, λ₁ / tr Σ is 0.13 to 0.95


def torch_muon(G):
    return _zeropower_via_newtonschulz(G, QUINTIC[0], 5, 1e-7).float()


def inverted(A, p, lower):
    iterations = newton_iterations((upper_bound(A) / lower).item(), p)
    return inverse_root(A, p, lower_bound=lower, iterations=iterations)


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16), (128, 512)])
def test_quintic_equals_torch_muon_bit_for_bit_where_the_norm_is_exact(shape):
    signs = torch.randint(0, 2, shape).float() * 2 - 1  # ‖signs‖ is a power of two
    assert torch.equal(orthogonalize(signs, ns_coefficients="quintic"), torch_muon(signs))


@pytest.mark.parametrize("shape", [(48, 48), (37, 100), (100, 37)])
def test_quintic_equals_torch_muon_up_to_bf16_rounding_of_the_norm(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    # torch rounds the norm and the quotient to bf16 (2⁻⁸), which five steps amplify; we use fp32.
    assert relative_error(orthogonalize(G, ns_coefficients="quintic"), torch_muon(G)) < 0.04


@pytest.mark.parametrize(
    ("ns_coefficients", "steps", "low", "high"),
    [
        ("quintic", 5, 0.65, 1.25),  # the known band, for σ >= 1e-2
        ("polar_express", 5, 0.84, 1.13),  # for σ >= 1e-3, with the safety factor
        ("polar_express", 6, 0.993, 1.002),
        ("polar_express", 10, 1 - 1e-6, 1 + 1e-6),
    ],
)
def test_singular_values_end_in_the_published_band(ns_coefficients, steps, low, high):
    least = -2 if ns_coefficients == "quintic" else -3
    sigma = torch.logspace(0, least, 400, dtype=torch.float64)
    G = torch.diag_embed(torch.stack([sigma, (1 - sigma**2).sqrt()], dim=1))  # of unit norm
    G = orthogonalize(G, steps=steps, ns_coefficients=ns_coefficients, dtype=torch.float64)
    assert low < G[:, 0, 0].min()
    assert G[:, 0, 0].max() < high


def test_the_polar_factor_is_reached_with_many_steps():
    G = torch.randn(20, 33, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(orthogonalize(G, steps=12, dtype=torch.float64), U @ Vh)


@pytest.mark.parametrize("ns_coefficients", ["quintic", "polar_express"])
@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1e-12, 1e30])
def test_the_scale_of_the_gradient_does_not_matter(ns_coefficients, scale):
    G = torch.ones(6, 4) * scale  # exactly representable, subnormals included
    unit = orthogonalize(torch.ones(6, 4), ns_coefficients=ns_coefficients)
    assert torch.equal(orthogonalize(G, ns_coefficients=ns_coefficients), unit)


def test_zero_matrices_give_zeros_beside_others_in_a_batch():
    G = torch.randn(3, 5, 8)
    G[1] = 0
    got = orthogonalize(G)
    assert torch.equal(got[1], torch.zeros(5, 8))
    assert torch.equal(got[2], orthogonalize(G[2]))


@settings(max_examples=20)
@given(m=st.integers(1, 17), n=st.integers(1, 17), wide=st.booleans())
def test_a_batch_equals_its_matrices_one_by_one_and_transposition_commutes(m, n, wide):
    G = torch.randn(2, 3, m, n, generator=torch.Generator().manual_seed(m * n))
    dtype = torch.float32 if wide else torch.bfloat16
    got = orthogonalize(G, dtype=dtype)
    assert got.shape == G.shape
    assert got.dtype == G.dtype
    tolerance = 1e-4 if wide else 3e-2  # batched products may sum in another order
    assert relative_error(got[1, 2], orthogonalize(G[1, 2], dtype=dtype)) < tolerance
    if m != n:  # for a square matrix, X Xᵀ is not the same product after a transposition
        assert torch.equal(got.mT, orthogonalize(G.mT, dtype=dtype))


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize(("condition", "tolerance"), [(1e1, 1e-3), (1e3, 1e-3), (1e4, 1e-2)])
def test_the_inverse_root_equals_the_dense_one(p, top, condition, tolerance):
    A, lower = spd(96, condition, top=top)
    X = inverted(A, p, lower)
    assert relative_error(X, exact_inverse_root(A, p)) < tolerance
    assert torch.equal(X, X.mT)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_float64_converges_to_the_tolerance_that_was_asked_for(p):
    A, lower = spd(40, 1e4, top=0.5, dtype=torch.float64)
    for tolerance in (1e-2, 1e-4, 1e-8):
        steps = newton_iterations((upper_bound(A) / lower).item(), p, tolerance=tolerance)
        X = inverse_root(A, p, lower_bound=lower, iterations=steps)
        worst = torch.linalg.matrix_norm(X @ torch.linalg.inv(exact_inverse_root(A, p)), 2) - 1
        assert worst.abs() < 1.1 * tolerance


@pytest.mark.parametrize("p", [1, 2, 4])
def test_the_root_solves_its_equation(p):
    A, lower = spd(64, 1e3, top=0.13)
    X = inverted(A, p, lower).double()
    assert relative_error(A.double() @ torch.linalg.matrix_power(X, p), torch.eye(64)) < 5e-3


@pytest.mark.parametrize("p", [1, 2, 4])
def test_scaling_saves_two_fifths_of_the_iterations_of_the_plain_scheme(p):
    for condition in (1e3, 1e4, 1e5):
        low, plain = 1 / condition, 0
        while (1 - low) / p > 1e-3:  # the plain scheme is not centered: its error is one-sided
            low, plain = low * ((p + 1 - low) / p) ** p, plain + 1
        assert newton_iterations(condition, p, tolerance=1e-3) <= 0.6 * plain


@pytest.mark.parametrize("p", [1, 2, 4])
def test_newton_error_is_that_of_newton_iterations(p):
    condition = torch.tensor([10.0, 1e3, 1e4])
    for i, each in enumerate(condition.tolist()):
        steps = newton_iterations(each, p, tolerance=1e-3)
        assert newton_error(condition, p, steps)[i] <= 1e-3
        assert newton_error(condition, p, steps - 1)[i] > 1e-3


def test_a_well_conditioned_matrix_takes_few_iterations_and_a_scaled_identity_none():
    assert newton_iterations(1.0, 1) == 0
    X = inverse_root(4 * torch.eye(5), 2, lower_bound=4.0, iterations=0)
    assert torch.equal(X, torch.eye(5) / 2)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_a_batch_with_one_bound_each_equals_a_loop(p):
    pairs = [spd(33, condition, top=0.3, seed=i) for i, condition in enumerate((10, 1e2, 1e3, 3e3))]
    A, lower = torch.stack([a for a, _ in pairs]), torch.tensor([low for _, low in pairs])
    X = inverse_root(A.view(2, 2, 33, 33), p, lower_bound=lower.view(2, 2), iterations=10)
    for i, got in enumerate(X.view(4, 33, 33)):
        alone = inverse_root(A[i], p, lower_bound=lower[i], iterations=10)
        assert relative_error(got, alone) < 1e-4  # products may sum in another order


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_covariance_does_not_matter(scale):
    A, lower = spd(24, 1e2, top=0.5)
    X = inverted(A * scale, 1, lower * scale)
    assert relative_error(X.double() * scale, exact_inverse_root(A, 1)) < 1e-3


def test_autocast_and_tf32_are_off_inside_and_restored_after():
    A, lower = spd(32, 1e3, top=0.5)
    outside = inverted(A, 1, lower)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(inverted(A, 1, lower), outside)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", ["cuda", "mkldnn"])
def test_tf32_that_was_set_by_backend_is_off_inside_and_restored_after(name):
    backend = getattr(torch.backends, name).matmul
    before, A = backend.fp32_precision, torch.eye(3)
    backend.fp32_precision = "tf32"
    try:
        with full_precision("cpu"):
            assert backend.fp32_precision == "ieee"
        inverse_root(A, 1, lower_bound=1.0, iterations=1)
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


@settings(max_examples=20)
@given(d=st.integers(1, 20), scale=st.floats(1e-18, 1e18), seed=st.integers(0, 5))
def test_the_upper_bound_holds_and_is_below_the_trace(d, scale, seed):
    Z = torch.randn(d + 3, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    A = (Z.mT @ Z * scale).float()
    bound, largest = upper_bound(A).double(), torch.linalg.eigvalsh(A.double())[-1]
    assert largest <= bound * (1 + 1e-6)
    assert bound <= A.double().trace() * (1 + 1e-6)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_the_probe_tells_a_failed_matrix_from_a_good_one(p):
    A, lower = spd(48, 1e3, top=0.5)
    good = inverted(A, p, lower)
    early = inverse_root(A, p, lower_bound=lower, iterations=2)
    eye, zero = torch.eye(48), torch.zeros(48, 48)
    X = torch.stack([good, early, 2 * good, eye, zero, good * torch.nan])
    residual = probe_residual(A.expand(6, 48, 48), torch.zeros(6), X, p)
    assert residual[0] < 0.01
    assert (residual[1:5] > 0.3).all()
    assert residual[5].isnan()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: orthogonalize(torch.ones(3)), "expected a floating"),
        (lambda: orthogonalize(torch.ones(3, 3), steps=0), "steps=0"),
        (lambda: orthogonalize(torch.ones(3, 3), ns_coefficients="cubic"), "'cubic'"),
        (lambda: inverse_root(torch.ones(3, 2), 1, lower_bound=1.0, iterations=1), r"\(3, 2\)"),
        (lambda: inverse_root(torch.eye(3), 3, lower_bound=1.0, iterations=1), "p=3"),
        (lambda: inverse_root(torch.eye(3), 1, lower_bound=1.0, iterations=-1), "iterations=-1"),
        (lambda: newton_iterations(0.5, 1), "condition=0.5"),
        (lambda: newton_iterations(float("nan"), 1), "condition=nan"),
    ],
)
def test_bad_arguments_are_refused_by_name(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()
