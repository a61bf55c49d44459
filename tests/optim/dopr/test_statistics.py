"""The mathematics of a layer against definitions in fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim.dopr.statistics import (
    apply_P,
    condition_bound,
    condition_number,
    diagonal_inverse_root,
    ema_update,
    mean_eigenvalue,
    norm_ratio,
    norms,
)
from optim.kernels.newton_schulz import upper_bound
from tests.optim.models import randn, relative_error


@given(beta=st.floats(0, 0.999), n=st.integers(1, 30))
def test_the_average_is_a_bias_corrected_ema(beta, n):
    batches = randn(n, 3, 3, seed=n, dtype=torch.float64)
    sigma, textbook = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 3).double()
    for i, batch in enumerate(batches, start=1):
        sigma = ema_update(sigma, batch, beta, i)
        textbook = beta * textbook + (1 - beta) * batch
    torch.testing.assert_close(sigma, textbook / (1 - beta**n), rtol=1e-9, atol=1e-11)


def test_without_an_average_only_the_newest_batch_counts():
    assert torch.equal(ema_update(torch.ones(2, 2), torch.zeros(2, 2), None, 5), torch.zeros(2, 2))


def test_the_mean_eigenvalue_is_that_of_all_blocks():
    X = randn(3, 4, 4, seed=1)
    blocks = X @ X.mT
    expected = torch.linalg.eigvalsh(torch.block_diag(*blocks)).mean()
    torch.testing.assert_close(mean_eigenvalue(blocks), expected)
    torch.testing.assert_close(mean_eigenvalue(blocks[0, 0].abs()), blocks[0, 0].abs().mean())


@pytest.mark.parametrize("p", [1, 2, 4])
def test_a_diagonal_root_raised_to_p_inverts(p):
    sigma, damping = torch.tensor([0.0, 0.5, 2.0]), torch.tensor(0.25)
    root = diagonal_inverse_root(sigma, damping, p)
    torch.testing.assert_close(root**p * (sigma + damping), torch.ones(3))


@given(blocks=st.integers(1, 4), b=st.integers(1, 5), d_out=st.integers(1, 6))
def test_blocks_multiply_like_one_block_diagonal_matrix(blocks, b, d_out):
    G, P = randn(d_out, blocks * b, seed=b), randn(blocks, b, b, seed=blocks)
    expected = G.double() @ torch.block_diag(*P.double())
    torch.testing.assert_close(apply_P(G, P).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_transposed_gradient_is_preconditioned_like_its_copy():
    G, P = randn(6, 5, seed=1).mT, randn(3, 2, 2, seed=2)
    torch.testing.assert_close(apply_P(G, P), apply_P(G.contiguous(), P))


def test_the_product_is_fp32_under_autocast_and_low_matmul_precision():
    G, P = randn(33, 64, seed=1), randn(1, 64, 64, seed=2)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            M = apply_P(G, P)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert M.dtype == torch.float32
    assert relative_error(M, G.double() @ P[0].double()) < 1e-6  # in bf16: 3e-3


def test_a_bf16_gradient_gives_an_fp32_product():
    G, P = randn(5, 8, seed=1, dtype=torch.bfloat16), randn(1, 8, 8, seed=2)
    M = apply_P(G, P)
    assert M.dtype == torch.float32
    assert relative_error(M, G.double() @ P[0].double()) < 1e-6


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_condition_number_is_that_of_the_damped_matrix(blocks):
    X = randn(blocks, 6, 6, seed=1)
    sigma, damping = X @ X.mT, torch.tensor(0.01)
    eigenvalues = torch.linalg.eigvalsh(torch.block_diag(*sigma).double()) + 0.01
    expected = eigenvalues[-1] / eigenvalues[0]
    assert condition_number(sigma, damping) == pytest.approx(expected.item(), rel=1e-4)


def test_the_condition_number_takes_the_damping_of_each_block():
    sigma = torch.diag_embed(torch.tensor([[4.0, 1.0], [2.0, 0.0]]))
    assert condition_number(sigma, torch.tensor([0.0, 0.5])) == pytest.approx(4 / 0.5)


def test_the_condition_number_of_a_diagonal_and_of_a_singular_matrix():
    diagonal = torch.tensor([1.0, 3.0])
    assert condition_number(diagonal, torch.tensor(1.0)) == pytest.approx(2)
    assert condition_number(torch.diag(torch.tensor([1.0, 0.0]))[None], torch.tensor(0.0)) > 1e15


def test_the_norm_ratio_of_a_zero_gradient_is_zero():
    assert norm_ratio(norms(torch.zeros(2, 2), torch.zeros(2, 2))) == 0
    ratio = norm_ratio(norms(torch.full((2, 2), 3.0), torch.ones(2, 2, dtype=torch.bfloat16)))
    assert ratio == pytest.approx(3)


@pytest.mark.parametrize("gamma", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("n", [1, 4, 50])
def test_no_covariance_exceeds_the_bound_on_its_condition(n, blocks, gamma):
    z = randn(blocks, n, 6, seed=n, dtype=torch.float64)
    z[1:] *= 1e-2  # nearly all in one block, where the bound is tightest
    sigma = z.mT @ z / n
    damping = gamma * mean_eigenvalue(sigma)
    ratio = upper_bound(sigma + damping * torch.eye(6)) / damping
    bound = condition_bound(6 * blocks, gamma) + 6**0.5  # ‖A‖_F <= tr(Σ) + γ̄ ‖I‖_F
    assert condition_number(sigma, damping) <= ratio.max() * (1 + 1e-9) <= bound * (1 + 1e-9)
    if n == 1:  # one direction holds the trace
        assert ratio.max() > 0.9 * bound - 6**0.5


def test_without_damping_there_is_no_bound_on_the_condition():
    assert condition_bound(6, 0.0) == float("inf")
