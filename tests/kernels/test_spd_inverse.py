"""kernels/spd_inverse.py against torch.linalg.inv."""

import pytest
import torch

from optim.kernels.spd_inverse import MAX_LAPACK_WIDTH, invert_spd_
from tests.kernels.spectra import relative_error, spd

WIDTHS = [1, 7, MAX_LAPACK_WIDTH, MAX_LAPACK_WIDTH + 1, 700, 1024]


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("condition", [1e2, 1e6])
def test_the_inverse_equals_that_of_torch_and_is_exactly_symmetric(d, condition):
    A = spd(d, condition, top=0.9)[0].double()
    X = A.clone()
    assert invert_spd_(X)
    assert torch.equal(X, X.mT)
    assert relative_error(X, torch.linalg.inv(A)) < 1e-15 * condition**1.5 + 1e-13


@pytest.mark.parametrize("d", [3, 300, 1100])
@pytest.mark.parametrize("where", [0.0, 0.4, 1.0])
def test_an_indefinite_matrix_is_reported(d, where):
    A = torch.eye(d, dtype=torch.float64)
    i = round(where * (d - 1))
    A[i, i] = -1
    assert not invert_spd_(A)


def test_a_matrix_whose_blocks_are_definite_but_not_the_whole_is_reported():
    A = torch.eye(600, dtype=torch.float64)
    A[0, 599] = A[599, 0] = 2
    assert not invert_spd_(A)
