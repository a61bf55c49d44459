"""The Triton kernels as custom operators: opcheck and torch.compile, on a GPU or interpreted."""

import pytest
import torch

from tests.kernels.spectra import spd
from tests.kernels.triton_device import (
    DEVICE,
    SMALL,
    randn,
    triton_apply,
    triton_newton_schulz,
    triton_symmetric,
)


def sums():
    return torch.zeros(2, 4, 4, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)


def test_the_sum_passes_opcheck():
    offset = torch.ones((), dtype=torch.int64, device=DEVICE)
    args = (*sums(), randn(3, 6, 8), offset, torch.tensor(False), 2, "triton")
    checks = ("test_schema", "test_faketensor")  # test_gram.py runs the others
    torch.library.opcheck(torch.ops.dopr.accumulate_gram.default, args, test_utils=checks)


@pytest.mark.parametrize("G", [randn(2, 5, 12), randn(2, 12, 5).mT], ids=["rows", "columns"])
def test_the_product_with_p_passes_opcheck(G):
    args = (G, randn(2, 3, 4, 4), "ieee", list(SMALL))
    torch.library.opcheck(triton_apply._apply, args)


@pytest.mark.parametrize("has_C", [True, False])
def test_the_symmetric_product_passes_opcheck(has_C):
    X, C = randn(2, 9, 5), torch.eye(9, device=DEVICE).repeat(2, 1, 1) if has_C else None
    args = (X, X.clone(), C, *(torch.ones(2, device=DEVICE) for _ in range(3)), "ieee", list(SMALL))
    torch.library.opcheck(triton_symmetric._symmetric_product, args)


def test_an_inverse_compiles_to_one_graph_and_equals_eager():
    A, lower = spd(20, 50)
    arguments = {"lower_bound": torch.tensor([lower], device=DEVICE), "iterations": 2}
    compiled = torch.compile(triton_newton_schulz.inverse_root, fullgraph=True, backend="aot_eager")
    expected = triton_newton_schulz.inverse_root(A[None].to(DEVICE), 1, **arguments)
    assert torch.equal(compiled(A[None].to(DEVICE), 1, **arguments), expected)


def test_orthogonalization_compiles_to_one_graph_and_equals_eager():
    G = randn(2, 12, 7)
    compiled = torch.compile(
        triton_newton_schulz.orthogonalize, fullgraph=True, backend="aot_eager"
    )
    arguments = {"steps": 2, "dtype": torch.float32}
    expected = triton_newton_schulz.orthogonalize(G, **arguments)
    assert torch.equal(compiled(G, **arguments), expected)
