"""Σ from a sample of tokens: which tokens are sampled, and what if all of them are zero."""

import logging

import pytest
import torch
from torch import nn

from optim import ActivationPreconditioner
from tests.optim.models import covariance, oracle, randn, relative_error


def test_token_stride_reaches_every_position_as_steps_go_on():
    layer = nn.Linear(8, 3, bias=False)
    preconditioner = ActivationPreconditioner(layer, gamma=0.1, token_stride=4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    preconditioner.attach(optimizer)
    sampled = []
    for _ in range(4):
        layer(torch.eye(8).expand(2, 8, 8)).sum().backward()  # token t is the unit vector e_t
        sampled.append(preconditioner.layers[0].capture.gram[0].diagonal() > 0)
        assert preconditioner.layers[0].capture.count == 4  # one in four of 2 x 8
        optimizer.step()
    assert torch.stack(sampled).any(0).all()
    assert not torch.equal(sampled[0], sampled[1])


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("collect_every", [1, 8])
def test_a_token_stride_reaches_every_position_whatever_the_micro_batch(batch, collect_every):
    model = nn.Sequential(nn.Linear(16, 2))
    steps = {"collect_every": collect_every, "refresh_every": 8 * collect_every}
    preconditioner = ActivationPreconditioner(model, gamma=0.1, token_stride=4, **steps)
    preconditioner.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    (layer,), seen = preconditioner.layers, torch.zeros(16)
    for step in range(4 * collect_every):
        layer.step, layer.n_refreshes, layer.next_refresh = step, 1, 10**6
        layer.schedule_next()
        for _ in range(4 // batch):  # micro-batches; z at position t is the t-th unit vector
            model(torch.eye(16).expand(batch, 16, 16)).sum().backward()
        seen += layer.capture.gram[0].diagonal()
        layer.capture.clear()
    assert (seen > 0).all()
    assert seen.max() == seen.min()


def test_embeddings_count_every_token_whatever_the_stride():
    table = nn.Embedding(4, 2)
    preconditioner = ActivationPreconditioner(table, gamma=0.1, embeddings=True, token_stride=3)
    table(torch.tensor([[0, 1, 1, 3, 3, 3, 3]])).sum().backward()
    capture = preconditioner.layers[0].capture
    assert capture.gram.tolist() == [1, 2, 0, 4]
    assert capture.count == 7


# -- a sample of zeros


def with_zero_sample(**settings):
    """Return layer, optimizer and preconditioner; step 0 samples token 0 of 4."""
    layer = nn.Linear(6, 2, bias=False)
    preconditioner = ActivationPreconditioner(layer, gamma=0.1, token_stride=4, **settings)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    return layer, optimizer, preconditioner.attach(optimizer)


def backward(layer, token: int, seed: int):
    """Run a backward on one sequence of 4 tokens, all zero except `token`; return input and G."""
    x = torch.zeros(1, 4, 6)
    x[0, token] = randn(6, seed=seed)
    layer.weight.grad = None
    (layer(x) * randn(2, seed=seed)).sum().backward()
    return x, layer.weight.grad.clone()


def test_a_first_sample_of_zeros_lets_the_gradient_pass_counted_and_logged(caplog):
    layer, optimizer, preconditioner = with_zero_sample()
    _, G = backward(layer, token=1, seed=1)
    with caplog.at_level(logging.WARNING, logger="dopr"):
        optimizer.step()
    assert torch.equal(layer.weight.grad, G)
    assert "all sampled activations are zero; the gradient is left as it is" in caplog.text
    assert preconditioner.report()[0]["fallbacks"] == 1
    x, G = backward(layer, token=1, seed=2)  # step 1 samples token 1; the sum of step 0 was dropped
    optimizer.step()
    assert relative_error(layer.weight.grad, oracle(G, covariance(x[0, 1:2]), 0.1)) < 1e-5


def test_a_later_sample_of_zeros_keeps_the_last_p_counted_and_logged(caplog):
    layer, optimizer, preconditioner = with_zero_sample()
    backward(layer, token=0, seed=1)
    optimizer.step()
    P = preconditioner.layers[0].P.clone()
    _, G = backward(layer, token=0, seed=2)  # step 1 samples token 1
    with caplog.at_level(logging.WARNING, logger="dopr"):
        optimizer.step()
    torch.testing.assert_close(layer.weight.grad, G @ P[0])
    assert torch.equal(preconditioner.layers[0].P, P)
    assert "the last P is kept" in caplog.text
    assert preconditioner.report()[0]["fallbacks"] == 1


def test_inputs_that_are_all_zero_have_no_gradient_and_need_no_mending():
    layer, optimizer, preconditioner = with_zero_sample()
    layer(torch.zeros(1, 4, 6)).sum().backward()
    optimizer.step()
    assert preconditioner.report()[0]["fallbacks"] == 0


# -- a sample of masked tokens


def masked_backward(layer, kept: list[int], seed: int):
    """Run a backward on each sequence of 8 tokens, all masked but `kept`; return G of all."""
    layer.weight.grad = None
    for sequence, token in enumerate(kept):
        grad_y = torch.zeros(1, 8, 5)
        grad_y[0, token] = randn(5, seed=seed + sequence)
        layer(randn(1, 8, 6, seed=seed + sequence)).backward(grad_y)
    return layer.weight.grad.clone()


@pytest.mark.parametrize("kept", [[3], [3, 2]], ids=["one backward", "accumulation"])
@pytest.mark.parametrize("settings", [{}, {"refresh_every": 2, "fresh_mean": True}])
def test_a_sample_of_masked_tokens_is_a_fallback(kept, settings, caplog):
    layer = nn.Linear(6, 5)
    preconditioner = ActivationPreconditioner(layer, gamma=0.1, token_stride=4, **settings)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    preconditioner.attach(optimizer)
    (state,) = preconditioner.layers
    G = masked_backward(layer, kept, seed=1)  # step 0 samples tokens 0 and 4, then 1 and 5
    optimizer.step()
    assert torch.equal(layer.weight.grad, G)
    assert "all sampled tokens are masked; the gradient is left as it is" in caplog.text
    masked_backward(layer, [1], seed=2)  # step 1 samples tokens 1 and 5
    optimizer.step()
    assert (state.n_refreshes, state.n_fallbacks) == (1, 1)
    before = state.P.clone(), state.mean.clone()
    state.next_refresh = state.step
    state.schedule_next()
    G = masked_backward(layer, [3], seed=3)  # step 2 samples tokens 2 and 6
    optimizer.step()
    assert "all sampled tokens are masked; the last P is kept" in caplog.text
    assert torch.equal(state.P, before[0])
    assert torch.equal(state.mean, before[1])
    if not settings:
        torch.testing.assert_close(layer.weight.grad, G @ state.P[0])


@pytest.mark.parametrize("drop", ["discard", "load", "paused"])
def test_a_gradient_whose_tokens_were_dropped_is_still_an_error(drop):
    layer, optimizer, preconditioner = with_zero_sample()
    state = preconditioner.state_dict()
    if drop == "paused":
        with preconditioner.paused():
            backward(layer, token=1, seed=1)
    else:
        backward(layer, token=1, seed=1)
        preconditioner.discard() if drop == "discard" else preconditioner.load_state_dict(state)
    with pytest.raises(RuntimeError, match="were not seen"):
        optimizer.step()
