"""kernels/_triton_symmetric.py and its tiles against dense float64, on a GPU or interpreted."""

import pytest
import torch

from optim.kernels.symmetric import mirror_
from tests.kernels.memory import guarded
from tests.kernels.spectra import relative_error
from tests.kernels.triton_device import (
    DEVICE,
    SMALL,
    randn,
    triton,
    triton_symmetric,
    triton_tiles,
)

pytestmark = pytest.mark.usefixtures("poisoned")
tl, symmetric_product = triton.language, triton_symmetric.symmetric_product

# For fp32 inputs, tf32 keeps 11 bits and bf16x3 about 16, or 1 bit less if bf16 is truncated.
TOLERANCE = {"bf16x3": 1e-4, "tf32": 2e-3, "ieee": 1e-6}


def symmetric(N, d, seed=0):
    return mirror_(randn(N, d, d, seed=seed))


def commuting(N, d):
    """Return A and B = A² - A / 2, which are symmetric and have a symmetric product."""
    A = symmetric(N, d).double() / d**0.5
    return A.float(), mirror_((A @ A - A / 2).float())


@triton.jit
def lower_tile_kernel(i_ptr, j_ptr, SIZE: tl.constexpr):
    t = tl.arange(0, SIZE)
    i, j = triton_tiles.lower_tile(t)
    tl.store(i_ptr + t, i)
    tl.store(j_ptr + t, j)


def test_tiles_are_numbered_row_by_row():
    i, j = torch.tril_indices(400, 400, device=DEVICE, dtype=torch.int32)
    size = 2**16
    got = torch.empty(2, size, dtype=torch.int32, device=DEVICE)
    lower_tile_kernel[(1,)](got[0], got[1], SIZE=size)
    assert torch.equal(got, torch.stack([i[:size], j[:size]]))
    assert triton_tiles.n_lower_tiles(16 * 399 + 1, 16) == len(i)


@pytest.mark.parametrize("config", [SMALL, None])
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(("N", "d"), [(1, 1), (2, 17), (1, 50)])
def test_a_product_of_commuting_matrices_equals_float64(N, d, precision, config):
    A, B = commuting(N, d)
    got = symmetric_product(A, B, precision=precision, config=config)
    assert relative_error(got, A.double() @ B.double()) < TOLERANCE[precision]
    assert torch.equal(got, got.mT)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(("N", "d", "k"), [(2, 20, 37), (1, 33, 1), (3, 5, 64)])
def test_a_gram_of_rows_equals_float64(N, d, k, precision):
    X = randn(N, d, k)
    got = symmetric_product(X, X, precision=precision, config=SMALL)
    assert relative_error(got, X.double() @ X.double().mT) < TOLERANCE[precision]
    assert torch.equal(got, got.mT)


def test_bf16_factors_are_summed_in_fp32_and_rounded_once():
    X = randn(2, 40, 70, dtype=torch.bfloat16)
    got = symmetric_product(X, X, precision="bf16", config=SMALL)
    expected = X.double() @ X.double().mT
    assert got.dtype == torch.bfloat16
    assert ((got.double() - expected).abs() <= 2**-7 * expected.abs() + 1e-4).all()
    assert torch.equal(got, got.mT)


def test_each_matrix_of_a_batch_has_its_own_coefficients():
    A, B = commuting(3, 33)
    C = symmetric(3, 33, seed=2)
    alpha, beta, gamma = randn(3, 3, seed=3)
    upper_is_nan = C + torch.full_like(C, torch.nan).triu(1)  # the upper triangle is not read
    got = symmetric_product(
        *(A, B), alpha=alpha, beta=beta, C=upper_is_nan, gamma=gamma, precision="ieee", config=SMALL
    )
    a, b, c = (each.double()[:, None, None] for each in (alpha, beta, gamma))
    expected = a * A.double() @ B.double() + b * C.double() + c * torch.eye(33, device=DEVICE)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(got, got.mT)


def test_numbers_and_tensors_are_the_same_coefficients():
    A, B = commuting(2, 20)
    numbers = {"alpha": 0.5, "beta": -2.0, "gamma": 0.25}
    tensors = {name: torch.tensor(value, device=DEVICE) for name, value in numbers.items()}
    as_numbers = symmetric_product(A, B, C=A, **numbers, precision="ieee", config=SMALL)
    as_tensors = symmetric_product(A, B, C=A, **tensors, precision="ieee", config=SMALL)
    assert torch.equal(as_numbers, as_tensors)


@pytest.mark.parametrize("precision", TOLERANCE)
def test_the_same_bits_every_time_and_in_any_batch(precision):
    A, B = commuting(3, 33)
    got = symmetric_product(A, B, C=B, precision=precision, config=SMALL)
    assert torch.equal(symmetric_product(A, B, C=B, precision=precision, config=SMALL), got)
    alone = symmetric_product(A[1:2], B[1:2], C=B[1:2], precision=precision, config=SMALL)
    assert torch.equal(alone, got[1:2])


def test_nothing_outside_the_matrices_is_read():
    A, B = (guarded(each)[0] for each in commuting(2, 21))
    got = symmetric_product(A, B, C=A, gamma=1.0, precision="bf16x3", config=SMALL)
    assert got.isfinite().all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"precision": "bf16"}, "'bf16' is not available for torch.float32"),
        ({"precision": "fp8"}, "fp8"),
        ({"B": torch.ones(1, 4, 5)}, r"\(1, 4, 5\)"),
        ({"C": torch.ones(1, 4, 5)}, r"\(1, 4, 4\)"),
        ({"C": torch.ones(1, 4, 4, dtype=torch.bfloat16)}, "one dtype"),
    ],
)
def test_bad_arguments_are_refused_by_name(bad, message):
    arguments = {"A": torch.ones(1, 4, 4), "B": torch.ones(1, 4, 4), "precision": "ieee", **bad}
    with pytest.raises(ValueError, match=message):
        symmetric_product(**arguments)
