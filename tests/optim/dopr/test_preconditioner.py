"""M equals a dense fp64 solve for every layer type, inverse and exponent; M is invariant."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from optim import ActivationPreconditioner
from tests.optim.models import covariance, ill_conditioned, oracle, randn, relative_error

FP32 = 6e-8  # rounding of Σ or P, which changes M by up to FP32 times the condition number


def preconditioned(model, x, *, gamma, weight=None, **settings):
    """Return G and M of one weight for a fixed linear loss on x, and the preconditioner."""
    preconditioner = ActivationPreconditioner(model, gamma=gamma, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    preconditioner.attach(optimizer)
    y = model(x)
    (y * randn(*y.shape, seed=5, dtype=y.dtype)).sum().backward()
    weight = next(model.parameters()) if weight is None else weight
    G = weight.grad.clone()
    optimizer.step()
    return G, weight.grad, preconditioner


def linear_case(d: int, n: int, condition: float, gamma: float, **settings):
    """Return M, the oracle from the captured Σ, that from the activations, and the condition."""
    z = ill_conditioned(n, d, condition=condition, seed=d).float()
    p = settings.get("exponent", 1)
    G, M, preconditioner = preconditioned(nn.Linear(d, 33), z, gamma=gamma, **settings)
    from_capture = oracle(G, preconditioner.layers[0].sigma[0], gamma, p=p)
    from_inputs = oracle(G, covariance(z), gamma, p=p)
    return M, from_capture, from_inputs, preconditioner.report(condition=True)[0]["condition"]


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize(
    ("d", "n", "condition", "gamma"), [(1, 3, 1, 0.1), (17, 64, 1e3, 0.1), (256, 300, 1e4, 1e-5)]
)
def test_cholesky_m_equals_a_dense_fp64_solve(d, n, condition, gamma, p):
    M, from_capture, from_inputs, kappa = linear_case(d, n, condition, gamma, exponent=p)
    assert relative_error(M, from_capture) < 1e-5
    assert relative_error(M, from_inputs) < 2e-6 + FP32 * kappa


def test_cholesky_m_equals_a_dense_fp64_solve_at_width_1024():
    M, from_capture, from_inputs, kappa = linear_case(1024, 1200, 1e4, 1e-4)
    assert 5e3 < kappa < 1e4
    assert relative_error(M, from_capture) < 1e-5
    assert relative_error(M, from_inputs) < FP32 * kappa


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize(("n", "gamma"), [(1, 0.1), (1, 1e-2), (20, 0.1), (20, 1e-2), (20, 1e-3)])
def test_with_fewer_tokens_than_features_m_equals_a_dense_fp64_solve(n, gamma, p):
    z = randn(n, 64, seed=n)
    G, M, preconditioner = preconditioned(nn.Linear(64, 33), z, gamma=gamma, exponent=p)
    kappa = preconditioner.report(condition=True)[0]["condition"]
    # G is zero where P is largest, so the rounding of P shows in full
    assert relative_error(M, oracle(G, covariance(z), gamma, p=p)) < 2e-6 + 3 * FP32 * kappa


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize(("kappa", "tolerance"), [(1e3, 1e-3), (1e4, 1e-2)])
@pytest.mark.parametrize(("d", "n"), [(33, 64), (256, 300)])
def test_newton_schulz_m_is_near_a_dense_fp64_solve(d, n, kappa, tolerance, p):
    eigenvalues = torch.logspace(
        0, -8, d
    )  # mostly below the damping, which is then the smallest eigenvalue of A
    gamma = float(1 / (kappa * eigenvalues.mean()))
    M, from_capture, _, condition = linear_case(
        d, n, 1e8, gamma, exponent=p, inverse="newton_schulz"
    )
    assert 0.9 * kappa < condition < 1.1 * kappa
    assert relative_error(M, from_capture) < tolerance  # what fp32 iterations reach at this κ


@pytest.mark.parametrize("inverse", ["cholesky", "newton_schulz"])
def test_dead_features_and_few_tokens_give_the_dense_solution(inverse):
    z = randn(10, 40, seed=1)
    z[:, ::3] = 0
    G, M, _ = preconditioned(nn.Linear(40, 7), z, gamma=0.05, inverse=inverse)
    assert M.isfinite().all()
    assert (M[:, ::3] == 0).all()
    assert relative_error(M, oracle(G, covariance(z), 0.05)) < 1e-4  # κ = 2e2, Newton-Schulz


def test_without_trace_normalisation_m_is_smaller_by_the_mean_eigenvalue():
    z = 3 * randn(50, 8, seed=1)
    G, M, _ = preconditioned(nn.Linear(8, 4), z, gamma=0.1, trace_normalized=False)
    expected = oracle(G, covariance(z), 0.1, trace_normalized=False)
    assert relative_error(M, expected) < 1e-5


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(("d", "widest", "b"), [(12, 4, 4), (12, 5, 4), (12, 12, 12), (7, 3, 1)])
def test_block_diagonal_equals_dense_on_a_covariance_cut_to_its_blocks(d, widest, b, p):
    z = randn(50, d, seed=1) + 1
    G, M, _ = preconditioned(nn.Linear(d, 6), z, gamma=0.1, block_diagonal=widest, exponent=p)
    in_same_block = torch.arange(d)[:, None] // b == torch.arange(d) // b
    assert relative_error(M, oracle(G, covariance(z) * in_same_block, 0.1, p=p)) < 1e-5


@pytest.mark.parametrize("p", [1, 2, 4])
def test_embedding_rows_are_divided_by_token_frequency(p):
    idx = torch.tensor([[0, 1, 1, 2], [1, 5, 5, 1]])
    G, M, _ = preconditioned(nn.Embedding(6, 3), idx, gamma=0.1, embeddings=True, exponent=p)
    one_hot = F.one_hot(idx, 6).double()
    assert relative_error(M.mT, oracle(G.mT, covariance(one_hot), 0.1, p=p)) < 1e-6
    assert (M[3:5] == 0).all()  # tokens that do not occur


@pytest.mark.parametrize("block_diagonal", [None, 4])
def test_conv1d_of_hugging_face_equals_the_linear_layer_transposed(block_diagonal):
    x = randn(9, 8, seed=1) + 1
    conv1d, linear = Conv1D(5, 8), nn.Linear(8, 5)
    linear.weight.data.copy_(conv1d.weight.mT)
    _, M, _ = preconditioned(conv1d, x, gamma=0.1, block_diagonal=block_diagonal)
    _, expected, _ = preconditioned(linear, x, gamma=0.1, block_diagonal=block_diagonal)
    assert relative_error(M.mT, expected) < 1e-6


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "geometry", [{}, {"stride": 2, "padding": (1, 2)}, {"dilation": 2, "padding": 1}]
)
def test_conv2d_is_a_linear_layer_on_patches(geometry, memory_format):
    conv = nn.Conv2d(3, 4, (3, 2), **geometry).to(memory_format=memory_format)
    x = (randn(5, 3, 8, 7, seed=1) + 0.5).to(memory_format=memory_format)
    G, M, _ = preconditioned(conv, x, gamma=0.1)
    patches = F.unfold(x, (3, 2), **geometry).mT
    expected = oracle(G.flatten(1), covariance(patches), 0.1).view_as(G)
    assert relative_error(M, expected) < 1e-5


def test_conv2d_takes_an_image_without_a_batch():
    x = randn(3, 8, 7, seed=1)
    G, M, _ = preconditioned(nn.Conv2d(3, 4, 3), x, gamma=0.1)
    expected = oracle(G.flatten(1), covariance(F.unfold(x, 3).mT), 0.1).view_as(G)
    assert relative_error(M, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_other_precisions_are_preconditioned_at_least_in_fp32(dtype):
    z = randn(50, 8, seed=1, dtype=dtype)
    G, M, preconditioner = preconditioned(nn.Linear(8, 4).to(dtype), z, gamma=0.1)
    expected = oracle(G, covariance(z), 0.1)
    assert M.dtype == dtype
    assert preconditioner.layers[0].P.dtype == torch.promote_types(dtype, torch.float32)
    assert relative_error(M, expected) < (1e-12 if dtype == torch.float64 else 2**-8)


def test_layers_of_different_precision_live_in_one_model():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4).double()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    x = randn(20, 4, seed=1)
    (model[0](x).sum() + model[1](x.double()).sum()).backward()
    optimizer.step()
    assert relative_error(model[0].weight.grad, model[1].weight.grad) < 1e-5


# -- Proposition 4.2: an invertible transform of a layer's input changes nothing


def trajectory(model, x, apply_weight, *, dopr: bool, steps: int = 20):
    """Return the outputs of `model` during training by SGD or DoPr-SGD with γ = 0, in fp64."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if dopr:
        ActivationPreconditioner(model, gamma=0.0, trace_normalized=False).attach(optimizer)
    with torch.no_grad():
        apply_weight(model[0].weight)
    outputs = []
    for _ in range(steps):
        y = model(x)
        outputs.append(y.detach().flatten())
        (y.flatten(1) - torch.linspace(-1, 1, len(x)).double()[:, None]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat(outputs)


def transform(d: int):
    """Return an invertible A (d, d) with condition number 10."""
    U, _, V = torch.linalg.svd(randn(d, d, seed=3, dtype=torch.float64))
    return (U * torch.logspace(0, 1, d, dtype=torch.float64)) @ V


def nets(kind: str):
    """Return two equal nets, an input (n, channels, ...) and its number of channels."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        first = nn.Linear(6, 8) if kind == "linear" else nn.Conv2d(3, 4, 3, padding=1)
        last = nn.Linear(8, 2) if kind == "linear" else nn.Conv2d(4, 1, 3)
        made.append(nn.Sequential(first, nn.Tanh(), last).double())
    shape = (40, 6) if kind == "linear" else (20, 3, 5, 5)
    return made, randn(*shape, seed=1, dtype=torch.float64), shape[1]


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("dopr", [True, False])
def test_only_dopr_is_invariant_to_a_transform_of_its_inputs(kind, dopr):
    (plain, transformed), x, d = nets(kind)
    A = transform(d)
    x_A = torch.einsum("ij,nj...->ni...", A, x)

    def by_inverse(W):
        W.copy_(torch.einsum("oj...,ji->oi...", W, A.inverse()))

    before = trajectory(plain, x, lambda W: None, dopr=dopr)
    after = trajectory(transformed, x_A, by_inverse, dopr=dopr)
    gap = (before - after).abs().max()
    assert gap < 1e-9 if dopr else gap > 1e-2  # fp64 rounding times the condition numbers
