"""AdaMuon against Algorithm 1 of the paper for one matrix, in double precision."""

import math

import pytest
import torch

from optim.adamuon import AdaMuon, adamuon_update
from optim.kernels.newton_schulz import orthogonalize

EXACT = {"ns_dtype": "float32", "ns_coefficients": "quintic"}


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stepped(weight, grads, group=None, **settings) -> torch.Tensor:
    param = torch.nn.Parameter(weight.clone())
    optimizer = AdaMuon([{"params": [param], **(group or {})}], **settings)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


def algorithm_1(weight, grads, *, lr, beta, weight_decay, nesterov, eps=1e-8) -> torch.Tensor:
    W = weight.double()
    M, V = torch.zeros_like(W), torch.zeros_like(W)
    for G in grads:
        M = beta * M + G
        sign = torch.sign(G + beta * M if nesterov else M).float()
        O = orthogonalize(sign, steps=5, ns_coefficients="quintic", dtype=torch.float32)  # noqa: E741
        V = beta * V + (1 - beta) * O.double() ** 2
        O_hat = O.double() / (V.sqrt() + eps)
        gamma = 0.2 * math.sqrt(W.numel()) / O_hat.norm()
        W = W - lr * (gamma * O_hat + weight_decay * W)
    return W.float()


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_algorithm_1_of_the_paper(shape, nesterov):
    weight, grads = randn(*shape, seed=9), [randn(*shape, seed=i) for i in range(4)]
    ours = stepped(weight, grads, lr=0.1, nesterov=nesterov, weight_decay=0.1, **EXACT)
    expected = algorithm_1(weight, grads, lr=0.1, beta=0.95, weight_decay=0.1, nesterov=nesterov)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)  # fp32 against double


def test_momentum_zero_is_the_sign_of_the_orthogonalized_sign():
    grad = randn(6, 4, seed=0)
    update = -stepped(torch.zeros(6, 4), [grad], lr=1.0, momentum=0.0, weight_decay=0.0, **EXACT)
    expected = orthogonalize(grad.sign(), steps=5, ns_coefficients="quintic", dtype=torch.float32)
    torch.testing.assert_close(update, 0.2 * expected.sign(), rtol=1e-5, atol=0)  # eps / |O|


def test_gradient_scale_does_not_matter_bit_for_bit():
    weight, grads = randn(6, 4, seed=9), [randn(6, 4, seed=i) for i in range(3)]
    large = stepped(weight, [1024 * grad for grad in grads], lr=0.1)
    assert torch.equal(large, stepped(weight, grads, lr=0.1))


@pytest.mark.parametrize("qkv_blocks", [1, 3])
def test_every_block_of_the_update_has_rms_one_fifth(qkv_blocks):
    grads, buffers = [randn(12, 6, seed=0)], [torch.zeros(12, 6)]
    settings = {"momentum": 0.9, "nesterov": True, "eps": 1e-8, "ns_steps": 5, **EXACT}
    (update,) = adamuon_update(
        grads, buffers, [torch.zeros(12, 6)], qkv_blocks=qkv_blocks, **settings
    )
    rms = update.view(qkv_blocks, -1).square().mean(dim=1).sqrt()
    torch.testing.assert_close(rms, torch.full((qkv_blocks,), 0.2))


def test_fused_blocks_are_stepped_like_separate_matrices():
    weight, grads = randn(12, 6, seed=9), [randn(12, 6, seed=i) for i in range(3)]
    whole = stepped(weight, grads, {"qkv_blocks": 3}, lr=0.1, **EXACT)
    parts = [
        stepped(weight[rows], [grad[rows] for grad in grads], lr=0.1, **EXACT)
        for rows in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-5, atol=1e-5)


def test_a_zero_gradient_only_decays():
    zeros = [torch.zeros(4, 4)] * 2
    stepped_weight = stepped(torch.ones(4, 4), zeros, lr=0.5, weight_decay=0.5)
    assert torch.equal(stepped_weight, torch.full((4, 4), 0.75**2))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_a_parameter_without_elements_is_left_alone(shape):
    assert stepped(torch.zeros(shape), [torch.zeros(shape)], lr=0.5).shape == shape


def test_lr_mult_scales_the_update_and_not_the_decay():
    weight, grads = randn(4, 4, seed=9), [randn(4, 4, seed=0)]
    one, half = (
        stepped(weight, grads, {"lr_mult": m}, lr=0.25, weight_decay=0.5) for m in (1.0, 0.5)
    )
    decayed = weight * (1 - 0.25 * 0.5)
    torch.testing.assert_close(half - decayed, (one - decayed) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eps", [0.0, -1e-8, float("inf")])
def test_eps_must_be_positive_and_finite(eps):
    with pytest.raises(ValueError, match=f"AdaMuon: eps={eps}: must be positive"):
        AdaMuon([torch.nn.Parameter(torch.ones(2, 2))], eps=eps)


def test_only_matrices_are_accepted():
    with pytest.raises(ValueError, match="AdaMuon only supports 2D parameters; gain is"):
        AdaMuon([("gain", torch.nn.Parameter(torch.ones(2)))])


def test_a_table_of_coefficients_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"AdaMuon: ns_coefficients=.*: must be one of"):
        AdaMuon([torch.nn.Parameter(torch.ones(2, 2))], ns_coefficients=[[3.0, -4.0, 2.0]])
