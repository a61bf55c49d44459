"""kernels/symmetric.py against full products in float64."""

import pytest
import torch

from optim.kernels.symmetric import add_symmetric_product_, mirror_

WIDTHS = [1, 5, 127, 128, 129, 300, 1030]


def test_mirror_never_reads_the_upper_triangle_and_works_in_place():
    Y = torch.randn(2, 5, 5)
    spoiled = Y.where(torch.ones(5, 5).tril().bool(), torch.nan)
    assert mirror_(spoiled) is spoiled
    assert torch.equal(spoiled, Y.tril() + Y.tril(-1).mT)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (-0.5, 0.9)])
def test_the_sum_equals_the_full_product_and_is_exactly_symmetric(d, alpha, beta):
    A, S = torch.randn(40, d), mirror_(torch.randn(d, d))
    expected = beta * S.double() + alpha * A.double().mT @ A.double()
    add_symmetric_product_(S, A, A, beta=beta, alpha=alpha)
    assert torch.equal(S, S.mT)
    torch.testing.assert_close(S.double(), expected, rtol=1e-5, atol=1e-4)


def test_two_different_factors_with_a_symmetric_product():
    B = torch.randn(200, 300, dtype=torch.float64)
    C = mirror_(torch.randn(200, 200, dtype=torch.float64))
    S = torch.zeros(300, 300, dtype=torch.float64)
    add_symmetric_product_(S, B, C @ B)  # Bᵀ C B
    torch.testing.assert_close(S, B.mT @ C @ B)
    assert torch.equal(S, S.mT)


def test_a_part_of_a_matrix_is_updated_and_the_rest_stays():
    whole, A = torch.ones(400, 400), torch.randn(30, 260).mT.contiguous().mT
    add_symmetric_product_(whole[140:, 140:], A, A)
    torch.testing.assert_close(whole[140:, 140:], 1 + A.mT @ A, rtol=1e-5, atol=1e-4)
    assert (whole[:140] == 1).all()
    assert (whole[:, :140] == 1).all()


def test_no_rows_add_nothing():
    S = mirror_(torch.randn(7, 7))
    before = S.clone()
    add_symmetric_product_(S, torch.ones(0, 7), torch.ones(0, 7))
    assert torch.equal(S, before)
