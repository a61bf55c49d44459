"""kernels/_triton_apply.py against dense float64, on a GPU or in Triton's interpreter."""

import pytest
import torch

from optim.dopr.statistics import apply_P
from tests.kernels.memory import guarded
from tests.kernels.spectra import relative_error
from tests.kernels.triton_device import SMALL, randn, triton_apply

pytestmark = pytest.mark.usefixtures("poisoned")
apply = triton_apply.apply
ONE = torch.ones(())

# bf16x3 keeps about 16 bits of fp32 inputs, the other two at least 21.
TOLERANCE = {"bf16x3": 1e-4, "tf32x3": 2e-6, "ieee": 1e-6}


def dense(G, P):
    """Return M in float64 from the dense block-diagonal P."""
    P = torch.stack([torch.block_diag(*each) for each in P.double()])
    return G.double() @ P


@pytest.mark.parametrize("config", [SMALL, None])
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(
    ("N", "m", "b", "blocks"), [(1, 1, 1, 1), (3, 20, 37, 1), (2, 33, 17, 3), (1, 70, 16, 4)]
)
def test_it_equals_float64_on_ragged_shapes(N, m, b, blocks, precision, config):
    G, P = randn(N, m, blocks * b), randn(N, blocks, b, b, seed=1)
    M = apply(G, P, precision=precision, config=config)
    assert relative_error(M, dense(G, P)) < TOLERANCE[precision]


def test_it_equals_the_reference():
    G, P = randn(2, 20, 51), randn(2, 3, 17, 17, seed=1)
    expected = torch.stack([apply_P(g, p) for g, p in zip(G, P, strict=True)])
    torch.testing.assert_close(apply(G, P, config=SMALL), expected, atol=2e-5, rtol=1e-5)


def test_the_identity_changes_no_bit():
    G, eye = randn(1, 30, 40), torch.eye(20).expand(1, 2, 20, 20)
    for precision in ("tf32x3", "ieee"):
        M = apply(G, eye.to(G.device), precision=precision, config=SMALL)
        torch.testing.assert_close(M, G, atol=0, rtol=0 if precision == "ieee" else 1e-6)


def test_the_gradient_may_lie_in_any_strides():
    G, P = randn(2, 33, 36), randn(2, 2, 18, 18, seed=1)
    M = apply(G, P, config=SMALL)
    assert torch.equal(apply(G.mT.contiguous().mT, P, config=SMALL), M)
    assert torch.equal(apply(torch.cat([G, G], dim=2)[..., :36], P, config=SMALL), M)


def test_the_same_bits_every_time_and_for_one_layer_alone():
    G, P = randn(3, 20, 36), randn(3, 2, 18, 18, seed=1)
    M = apply(G, P, config=SMALL)
    assert torch.equal(apply(G, P, config=SMALL), M)
    assert torch.equal(apply(G[1:2], P[1:2], config=SMALL), M[1:2])


def test_nothing_outside_the_matrices_is_read():
    G, P = guarded(randn(2, 19, 22))[0], guarded(randn(2, 2, 11, 11))[0]
    for precision in TOLERANCE:
        assert apply(G, P, precision=precision, config=SMALL).isfinite().all()


@pytest.mark.parametrize(
    ("G", "P", "precision", "message"),
    [
        (torch.ones(1, 3, 4), torch.ones(1, 1, 4, 4), "bf16", "'bf16'"),
        (torch.ones(1, 3, 4), torch.ones(1, 1, 3, 3), "ieee", r"\(1, 1, 3, 3\)"),
        (torch.ones(1, 3, 4), torch.ones(2, 1, 4, 4), "ieee", r"\(2, 1, 4, 4\)"),
        (ONE.expand(1, 2**16, 2**15), ONE.expand(1, 1, 2**15, 2**15), "ieee", "< 2³¹"),
        (ONE.as_strided((1, 1, 1), (1, 2**31, 1)), ONE.view(1, 1, 1, 1), "ieee", "< 2³¹"),
        (torch.ones(1, 3, 4).bfloat16(), torch.ones(1, 1, 4, 4), "ieee", "bfloat16"),
    ],
)
def test_bad_arguments_are_refused_by_name(G, P, precision, message):
    with pytest.raises(ValueError, match=message):
        apply(G, P, precision=precision)
