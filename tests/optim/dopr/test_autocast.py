"""Under autocast, a covered layer accepts and rejects the same inputs as a plain layer."""

import pytest
import torch
from torch import nn

from optim import ActivationPreconditioner
from tests.optim.models import covariance, randn, relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.complex64]


def result(layer, x):
    """Return the output of a layer under autocast, or its error message."""
    with torch.autocast("cpu", torch.bfloat16):
        try:
            return layer(x)
        except RuntimeError as error:
            return str(error)


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_error_are_those_of_the_plain_layer(dtype, weight_dtype):
    plain, layer = nn.Linear(8, 4), nn.Linear(8, 4)
    layer.load_state_dict(plain.state_dict())
    plain, layer = plain.to(weight_dtype), layer.to(weight_dtype)
    ActivationPreconditioner(layer, gamma=0.1)
    x = randn(5, 8, seed=1).to(dtype)
    expected, got = result(plain, x), result(layer, x)
    if isinstance(expected, str):
        assert got == expected
    else:
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def test_sigma_of_float64_inputs_is_not_rounded():
    layer, x = nn.Linear(8, 4).double(), randn(20, 8, seed=1, dtype=torch.float64)
    preconditioner = ActivationPreconditioner(layer, gamma=0.1)
    result(layer, x).sum().backward()
    capture = preconditioner.layers[0].capture
    assert relative_error(capture.gram[0] / capture.count, covariance(x)) < 1e-14  # in bf16: 1e-3
