"""kernels/_triton_gram.py against kernels/gram.py, on a GPU or in Triton's interpreter."""

from itertools import product

import pytest
import torch

from optim.kernels import gram, symmetric
from tests.kernels.memory import guarded, is_intact
from tests.kernels.triton_device import DEVICE, SMALL, randn, triton_gram

pytestmark = pytest.mark.usefixtures("poisoned")


def both(z, blocks=1, *, config=SMALL, **arguments):
    """Return S and the count of the Triton kernel and of the reference, from the same random S."""
    b = z.shape[-1] // blocks
    S = symmetric.mirror_(randn(blocks, b, b, seed=1))
    expected = S.clone()
    S += torch.full_like(S, torch.nan).triu(1)  # the upper triangle is not read
    got_n = triton_gram.gram_(S, z, config=config, **arguments)
    expected_n = gram.gram_(expected, z, **arguments)
    return S, expected, got_n, expected_n


@pytest.mark.parametrize("config", [SMALL, None])
@pytest.mark.parametrize(
    ("B", "T", "b", "blocks", "stride", "offset", "dtype"),
    [
        (1, 7, 5, 1, 1, 0, torch.float32),
        (3, 13, 40, 2, 4, 5, torch.bfloat16),
        (2, 33, 17, 3, 2, 1000003, torch.float16),
        (4, 9, 33, 1, 11, -3, torch.bfloat16),
        (5, 1, 1, 4, 1, 2, torch.float32),
        (2, 16, 64, 1, 4, 0, torch.bfloat16),
        (1, 50, 80, 1, 3, 7, torch.float32),
    ],
)
def test_it_equals_the_reference_on_ragged_shapes(B, T, b, blocks, stride, offset, dtype, config):
    z = randn(B, T, b * blocks, dtype=dtype)
    sampling = {"stride": stride, "offset": offset}
    S, expected, got_n, expected_n = both(z, blocks, config=config, beta=0.9, alpha=0.1, **sampling)
    assert got_n == expected_n
    torch.testing.assert_close(S, expected, atol=2e-6, rtol=1e-5)  # sums of at most 66 terms
    assert torch.equal(S, S.mT)


@pytest.mark.parametrize(
    "offset", [6, 10**12 + 5, -4, *(pytest.param(x, marks=pytest.mark.slow) for x in (0, 1, 12))]
)
def test_the_sampled_positions_are_those_of_the_reference(offset):
    z = torch.eye(4 * 13, device=DEVICE).reshape(4, 13, 52)  # its gram is a histogram
    S, expected, _, _ = both(z, stride=4, offset=torch.tensor(offset, device=DEVICE), beta=0.0)
    assert torch.equal(S, expected)


def test_it_is_beta_s_plus_alpha_times_the_sum_with_coefficients_on_the_device():
    z, numbers = randn(30, 24), {"beta": 0.75, "alpha": 0.5}
    tensors = {name: torch.tensor(value, device=DEVICE) for name, value in numbers.items()}
    S, expected, _, _ = both(z, 2, **tensors)
    torch.testing.assert_close(S, expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(S, both(z, 2, **numbers)[0])


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
def test_many_splits_give_the_same_sum_and_the_same_bits_every_time(dtype, monkeypatch):
    monkeypatch.setattr(triton_gram, "SPLIT_ROWS", 16)
    z = randn(3, 37, 40, dtype=dtype)
    assert triton_gram.split_rows(111, 6, 16) == 32
    S, expected, _, _ = both(z, 2)
    torch.testing.assert_close(S, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(S, S.mT)
    assert torch.equal(S, both(z, 2)[0])


def test_integer_valued_inputs_give_the_exact_sum():
    z = (8 * randn(2, 50, 36)).round().clamp(-8, 8).bfloat16()
    S, expected, _, _ = both(z, 3, beta=0.0)
    assert torch.equal(S, expected)


COLUMN_SUMS = {  # quick cases of the next test
    (torch.bfloat16, 3, (33, 2)),
    (torch.float32, 1, (5, 3)),
    (torch.float32, 1, (40, 1)),
    (torch.bfloat16, 3, (5, 3)),
}


@pytest.mark.parametrize(
    ("dtype", "stride", "shape"),
    [
        pytest.param(*case, marks=[] if case in COLUMN_SUMS else [pytest.mark.slow])
        for case in product(
            (torch.bfloat16, torch.float32), (1, 3), ((40, 1), (5, 3), (33, 2), (128, 1))
        )
    ],
)
def test_column_sums_are_those_of_the_reference_and_change_no_bit_of_s(
    dtype, stride, shape, monkeypatch
):
    b, blocks = shape
    monkeypatch.setattr(triton_gram, "SPLIT_ROWS", 16)
    z = randn(3, 17, b * blocks, dtype=dtype)
    own = randn(b * blocks, seed=2)
    expected = own.clone()
    sampling = {"stride": stride, "offset": 4}
    S, *_ = both(z, blocks, column_sums=own, **sampling)
    assert torch.equal(S, both(z, blocks, **sampling)[0])
    own = randn(b * blocks, seed=2)
    triton_gram.gram_(torch.zeros_like(S), z, column_sums=own, config=SMALL, **sampling)
    gram.gram_(torch.zeros_like(S), z, column_sums=expected, **sampling)
    torch.testing.assert_close(own, expected, atol=5e-6, rtol=1e-5)


def test_nothing_outside_s_and_z_is_read_or_written():
    z, _ = guarded(randn(2, 11, 23))
    S, buffer = guarded(torch.zeros(1, 23, 23, device=DEVICE), guard=7.0)
    sums, sums_buffer = guarded(torch.zeros(1, 23, device=DEVICE), guard=7.0)
    triton_gram.gram_(S, z, beta=0.5, stride=2, column_sums=sums[0], config=SMALL)
    assert S.isfinite().all()
    assert sums.isfinite().all()
    assert is_intact(buffer, guard=7.0)  # NaN would not reveal a row that is read and written back
    assert is_intact(sums_buffer, guard=7.0)


def test_rows_and_columns_may_lie_apart():
    wide = torch.full((2, 9, 60), torch.nan, device=DEVICE)
    wide[..., 8:40] = randn(2, 9, 32)
    padded, transposed = wide[..., 8:40], wide[..., 8:40].mT.contiguous().mT
    S, expected, _, _ = both(padded, 2, stride=2)
    torch.testing.assert_close(S, expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(both(transposed, 2, stride=2)[0], S)


def test_s_may_be_a_slice_of_a_larger_tensor():
    large = torch.zeros(4, 20, 50, device=DEVICE)
    S = large[::2, :, 10:50:2]
    z = randn(15, 40)
    triton_gram.gram_(S, z, config=SMALL)
    expected = torch.zeros(2, 20, 20, device=DEVICE)
    gram.gram_(expected, z)
    torch.testing.assert_close(S, expected, atol=2e-6, rtol=1e-5)
    S.zero_()
    assert not large.any()


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_input_that_is_not_finite_shows(value):
    z = randn(20, 18)
    z[7, 3] = value
    S = both(z)[0]
    assert not S[0, 3].isfinite().any()
    assert not S[0, :, 3].isfinite().any()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda S, z: (S, z.double()), "float64"),
        (lambda S, z: (S.double(), z), "float64"),
        (lambda S, z: (S, z[:, :7]), r"\(8, 7\)"),
        (lambda S, z: (S, z[0]), r"\(8,\)"),
        (lambda S, z: (S, z, z), r"column_sums of shape \(8,\)"),
    ],
)
def test_bad_arguments_are_refused_by_name(bad, message):
    S, z, *sums = bad(torch.zeros(1, 8, 8, device=DEVICE), randn(8, 8))
    with pytest.raises(ValueError, match=message):
        triton_gram.gram_(S, z, column_sums=sums[0] if sums else None)
