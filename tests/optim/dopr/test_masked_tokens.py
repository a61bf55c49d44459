"""Tokens whose output gradient is exactly zero add nothing to Σ, its count or M."""

import pytest
import torch
from torch import nn

from optim import ActivationPreconditioner
from tests.optim.models import covariance, mlp, oracle, randn, relative_error

B, T, D = 6, 10, 12


def batch(keep: int):
    """Return inputs (B, T, D) and a mask (B, T) that keeps the first tokens of each sequence."""
    x = randn(B, T, D, seed=3) + 0.5
    mask = torch.arange(T).expand(B, T) < keep
    return x, mask


def step(model, losses, **settings):
    """Run one step on these losses; return the preconditioner, the gradients G and M."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    preconditioner = ActivationPreconditioner(model, gamma=0.1, **settings).attach(optimizer)
    for loss in losses(model):
        loss.backward()
    weights = [layer.covered.weight for layer in preconditioner.layers]
    G = [weight.grad.clone() for weight in weights]
    optimizer.step()
    return preconditioner, G, [weight.grad.clone() for weight in weights]


def masked_loss(x, mask):
    return lambda model: [(model(x).square().sum(-1) * mask).sum()]


@pytest.mark.parametrize("keep", [1, 7, 10])
def test_m_is_that_of_the_trimmed_batch(keep):
    x, mask = batch(keep)
    x[~mask] = 1e3  # what padding holds does not matter
    padded, G, M = step(mlp(), masked_loss(x, mask))
    trimmed, G0, M0 = step(mlp(), masked_loss(x[:, :keep], mask[:, :keep]))
    for a, b in zip(padded.layers, trimmed.layers, strict=True):
        assert relative_error(a.sigma, b.sigma) < 1e-6
    for a, b in zip([*G, *M], [*G0, *M0], strict=True):
        assert relative_error(a, b) < 1e-5


def test_m_of_a_padded_batch_is_the_dense_oracle_over_the_kept_tokens():
    x, mask = batch(4)
    _, G, M = step(nn.Sequential(nn.Linear(D, 5)), masked_loss(x, mask))
    assert relative_error(M[0], oracle(G[0], covariance(x[mask]), 0.1)) < 1e-5


def test_padding_may_hold_values_that_are_not_finite():
    x, mask = batch(4)
    layer = nn.Linear(D, 5)
    preconditioner = ActivationPreconditioner(layer, gamma=0.1)
    x[~mask] = torch.nan
    grad_y = randn(B, T, 5, seed=4) * mask[..., None]
    layer(x).backward(grad_y)
    capture = preconditioner.layers[0].capture
    assert relative_error(capture.gram[0] / capture.count, covariance(x[mask])) < 1e-6


def test_all_tokens_count_on_request():
    x, mask = batch(4)
    preconditioner, _, _ = step(mlp(), masked_loss(x, mask), count_masked=True)
    assert relative_error(preconditioner.layers[0].sigma, covariance(x)) < 1e-6


def test_a_batch_without_masked_tokens_gives_the_same_bits():
    x, mask = batch(T)
    for a, b in zip(
        step(mlp(), masked_loss(x, mask))[2],
        step(mlp(), masked_loss(x, mask), count_masked=True)[2],
        strict=True,
    ):
        assert torch.equal(a, b)


def test_ragged_accumulation_equals_one_batch():
    x, mask = batch(4)
    mask = mask & (torch.arange(B) != 2)[:, None]  # one micro-batch has no token that counts

    def parts(model):
        loss = model(x).square().sum(-1) * mask
        return [loss[i].sum() for i in range(B)]

    def separate(model):
        return [(model(x[i]).square().sum(-1) * mask[i]).sum() for i in range(B)]

    one, _, M = step(mlp(), lambda model: [sum(parts(model))])
    many, _, M0 = step(mlp(), separate)
    assert relative_error(one.layers[0].sigma, many.layers[0].sigma) < 1e-6
    assert relative_error(M[0], M0[0]) < 1e-5


@pytest.mark.parametrize("stride", [2, 5])
def test_a_token_stride_samples_first_and_masks_then(stride):
    x, mask = batch(4)
    model = nn.Sequential(nn.Linear(D, 5))
    preconditioner, _, _ = step(model, masked_loss(x, mask), token_stride=stride)
    rows = [(b, (b + j) % T) for b in range(B) for j in range(0, T, stride)]
    kept = torch.stack([x[b, t] for b, t in rows if mask[b, t]])
    assert relative_error(preconditioner.layers[0].sigma, covariance(kept)) < 1e-6


def test_patches_of_a_convolution_without_gradient_do_not_count():
    layer, x = nn.Conv2d(3, 4, 2), randn(2, 3, 5, 5, seed=5)
    preconditioner = ActivationPreconditioner(layer, gamma=0.1)
    grad_y = randn(2, 4, 4, 4, seed=6)
    grad_y[:, :, 2:] = 0
    layer(x).backward(grad_y)
    capture = preconditioner.layers[0].capture
    patches = nn.functional.unfold(x, 2).mT.reshape(2, 4, 4, 12)[:, :2].reshape(-1, 12)
    assert capture.count == 2 * 2 * 4
    assert relative_error(capture.gram[0], patches.mT @ patches) < 1e-6


def test_ids_of_an_embedding_without_gradient_do_not_count():
    layer, ids = nn.Embedding(4, 3), torch.tensor([[0, 1, 1], [3, 0, 3]])
    preconditioner = ActivationPreconditioner(layer, gamma=0.1, embeddings=True)
    grad_y = torch.ones(2, 3, 3)
    grad_y[1, 1:] = 0
    layer(ids).backward(grad_y)
    capture = preconditioner.layers[0].capture
    assert capture.gram.tolist() == [1, 2, 0, 1]
    assert capture.count == 4


@pytest.mark.parametrize(("count_masked", "expected"), [(False, [1, 0, 1]), (True, [1, 2, 1])])
def test_the_padding_of_an_embedding_counts_on_request_only(count_masked, expected):
    layer, ids = nn.Embedding(3, 4, padding_idx=-2), torch.tensor([[0, 1], [2, 1]])
    settings = {"embeddings": True, "count_masked": count_masked}
    capture = ActivationPreconditioner(layer, gamma=0.1, **settings).layers[0].capture
    layer(ids).sum().backward()
    assert capture.gram.tolist() == expected
    assert capture.count == sum(expected)


def test_a_tiny_gradient_is_not_zero():
    layer = nn.Linear(D, 5)
    preconditioner = ActivationPreconditioner(layer, gamma=0.1)
    grad_y = torch.full((3, 5), 1e-30)  # its squares underflow
    grad_y[1] = 0
    layer(randn(3, D, seed=7)).backward(grad_y)
    assert preconditioner.layers[0].capture.count == 2


def test_one_vector_without_a_batch_dimension_counts_once():
    layer = nn.Linear(D, 5)
    preconditioner = ActivationPreconditioner(layer, gamma=0.1)
    layer(randn(D, seed=8)).sum().backward()
    (layer(randn(D, seed=9)) * 0).sum().backward()
    assert preconditioner.layers[0].capture.count == 1


def test_an_image_without_a_batch_dimension_is_masked_by_position():
    layer = nn.Conv2d(1, 3, 1, bias=False)
    preconditioner = ActivationPreconditioner(layer, gamma=0.1)
    layer(torch.ones(1, 3, 3))[:, 0].sum().backward()  # one of three rows of pixels
    capture = preconditioner.layers[0].capture
    assert capture.count == capture.gram.item() == 3
