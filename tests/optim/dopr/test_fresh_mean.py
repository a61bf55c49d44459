"""With `fresh_mean`, M uses the mean of the step's tokens and the C of the last refresh."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from optim import ActivationPreconditioner
from optim.dopr.mean import correct_for_mean
from tests.optim.models import backward, mlp, randn, regression, relative_error

GAMMA = 0.1
D, D_OUT = 12, 5


def linear(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D_OUT))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    preconditioner = ActivationPreconditioner(model, gamma=GAMMA, fresh_mean=True, **settings)
    return model, optimizer, preconditioner.attach(optimizer)


def batch(step):
    """Return inputs (4, 16, D) whose mean differs from step to step."""
    return randn(4, 16, D, seed=step) + randn(D, seed=50 + step)


def expected(G, x_refresh, x, blocks=1):
    """Return M in fp64: C of the tokens `x_refresh`, μ of the tokens `x`."""
    old, new = (each.reshape(-1, D).double() for each in (x_refresh, x))
    C = old.mT @ old / len(old) - torch.outer(old.mean(0), old.mean(0))
    mean_at_refresh = C.trace() / D + old.mean(0).square().sum() / D
    A = C + torch.outer(new.mean(0), new.mean(0)) + GAMMA * mean_at_refresh * torch.eye(D)
    b = D // blocks
    A = A * (torch.arange(D)[:, None] // b == torch.arange(D) // b)
    return mean_at_refresh * torch.linalg.solve(A, G.double().mT).mT


def step(model, optimizer, parts, is_masked=None):
    """Take a step on the sum of losses of these parts of a batch; return G and M."""
    optimizer.zero_grad()
    for x in parts:
        loss = torch.sin(model(x)).sum(-1)
        (loss if is_masked is None else loss * ~is_masked).sum().backward()
    G = model[0].weight.grad.clone()
    optimizer.step()
    return G, model[0].weight.grad


@pytest.mark.parametrize("settings", [{}, {"block_diagonal": 4}, {"inverse": "newton_schulz"}])
def test_m_is_the_dense_oracle_in_every_step(settings):
    model, optimizer, _ = linear(refresh_every=3, collect_every=3, **settings)
    for number in range(5):
        x = batch(number)
        G, M = step(model, optimizer, [x])
        blocks = 3 if "block_diagonal" in settings else 1
        assert relative_error(M, expected(G, batch(number // 3 * 3), x, blocks)) < 1e-5


def test_micro_batches_add_up():
    model, optimizer, _ = linear(refresh_every=3, collect_every=3)
    for number in range(3):
        x = batch(number)
        G, M = step(model, optimizer, x.split([1, 2, 1]))
        assert relative_error(M, expected(G, batch(0), x)) < 1e-5


@pytest.mark.parametrize("count_masked", [True, False])
def test_the_mean_is_that_of_the_sampled_tokens(count_masked):
    settings = {"token_stride": 4, "count_masked": count_masked}
    model, optimizer, _ = linear(refresh_every=3, collect_every=3, **settings)
    tokens = []
    for number, first in enumerate((0, 4, 4)):  # the offset moves with the tokens of Σ
        G, M = step(model, optimizer, [batch(number)])
        index = [(b, (first + b + j) % 16) for b in range(4) for j in range(0, 16, 4)]
        tokens.append(torch.stack([batch(number)[place] for place in index]))
        assert relative_error(M, expected(G, tokens[0], tokens[-1])) < 1e-5


def test_masked_tokens_do_not_move_the_mean():
    model, optimizer, preconditioner = linear(refresh_every=3, collect_every=3)
    is_masked = (torch.arange(16) > 9).expand(4, 16)
    for number in range(2):
        x = batch(number)
        x[is_masked] = torch.nan
        x = x.nan_to_num(1e3)
        G, M = step(model, optimizer, [x], is_masked)
    kept = [batch(number)[~is_masked] for number in range(2)]
    assert relative_error(preconditioner.layers[0].mean[0], kept[1].mean(0)) < 1e-6
    assert relative_error(M, expected(G, *kept)) < 1e-5


@pytest.mark.parametrize("settings", [{}, {"block_diagonal": 4}, {"trace_normalized": False}])
def test_with_a_refresh_in_every_step_it_is_exact_mode(settings):
    results = []
    for fresh_mean in (True, False):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ActivationPreconditioner(model, gamma=GAMMA, fresh_mean=fresh_mean, **settings).attach(
            optimizer
        )
        for number in range(3):
            optimizer.zero_grad()
            backward(model, number)
            optimizer.step()
        results.append([parameter.grad for parameter in model.parameters()])
    for fresh, exact in zip(*results, strict=True):
        assert relative_error(fresh, exact) < 1e-5


def test_a_mean_of_zero_changes_no_bit():
    M, P = randn(5, 12, seed=1), randn(3, 4, 4, seed=2)
    assert torch.equal(correct_for_mean(M.clone(), P, torch.zeros(3, 4), torch.ones(())), M)


def test_the_covariance_is_averaged_and_the_mean_is_not():
    model, optimizer, preconditioner = linear(refresh_every=2, collect_every=2, sigma_beta=0.5)
    for number in range(3):
        step(model, optimizer, [batch(number)])
    first, second = (batch(number).reshape(-1, D).double() for number in (0, 2))
    C, C2 = (x.mT @ x / 64 - torch.outer(x.mean(0), x.mean(0)) for x in (first, second))
    layer = preconditioner.layers[0]
    assert relative_error(layer.sigma[0], (0.5 * C + C2) / 1.5) < 1e-5
    assert relative_error(layer.mean[0], second.mean(0)) < 1e-6


def test_tokens_that_are_not_finite_keep_the_last_mean():
    model, optimizer, preconditioner = linear(refresh_every=5)
    step(model, optimizer, [batch(0)])
    before = preconditioner.layers[0].mean.clone()
    x = batch(1)
    x[0, 0] = torch.inf
    step(model, optimizer, [x])
    assert torch.equal(preconditioner.layers[0].mean, before)


def test_a_skipped_step_leaves_nothing_behind():
    results = []
    for is_skipped in (True, False):
        model, optimizer, preconditioner = linear(refresh_every=3, collect_every=3)
        step(model, optimizer, [batch(0)])
        if is_skipped:
            model(batch(7)).square().sum().backward()
            optimizer.zero_grad()
            preconditioner.discard()
        results.append(step(model, optimizer, [batch(1)])[1])
    assert torch.equal(*results)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_training_resumes_bit_for_bit(at):
    def made():
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters())
        settings = {"fresh_mean": True, "refresh_every": 3, "sigma_beta": 0.9}
        preconditioner = ActivationPreconditioner(model, gamma=GAMMA, **settings)
        return model, optimizer, preconditioner.attach(optimizer)

    def train(model, optimizer, numbers):
        for number in numbers:
            optimizer.zero_grad()
            backward(model, number)
            optimizer.step()

    first, again = made(), made()
    train(*first[:2], range(at))
    for old, new in zip(first, again, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    for parts in (first, again):
        train(*parts[:2], range(at, 7))
    for a, b in zip(first[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_with_another_setting_is_refused():
    plain = ActivationPreconditioner(mlp(), gamma=GAMMA)
    fresh = ActivationPreconditioner(mlp(), gamma=GAMMA, fresh_mean=True)
    with pytest.raises(ValueError, match="saved with fresh_mean=True"):
        plain.load_state_dict(fresh.state_dict())
    with pytest.raises(ValueError, match="saved with fresh_mean=False"):
        fresh.load_state_dict(plain.state_dict())


def test_a_mean_that_is_not_finite_is_refused():
    fresh = ActivationPreconditioner(mlp(), gamma=GAMMA, fresh_mean=True)
    state = fresh.state_dict()
    state["0"]["mean"] = torch.full_like(state["0"]["mean"], torch.nan)
    with pytest.raises(ValueError, match="mean is not finite"):
        fresh.load_state_dict(state)


def test_the_condition_is_that_of_the_covariance_with_its_mean():
    conditions = []
    for fresh_mean in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        preconditioner = ActivationPreconditioner(layer, gamma=GAMMA, fresh_mean=fresh_mean)
        preconditioner.attach(optimizer)
        layer(randn(99, 4, seed=1) + 10).square().sum().backward()
        optimizer.step()
        conditions.append(preconditioner.report(condition=True)[0]["condition"])
    assert conditions[0] == pytest.approx(conditions[1], rel=1e-3)


def test_another_gamma_recomputes_p_with_the_mean_of_the_state():
    def trained(gamma):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        preconditioner = ActivationPreconditioner(model, gamma=gamma, fresh_mean=True)
        preconditioner.attach(optimizer)
        backward(model)
        optimizer.step()
        return preconditioner

    other, loaded = trained(0.5), trained(0.1)
    target = ActivationPreconditioner(mlp(), gamma=0.5, fresh_mean=True)
    target.load_state_dict(loaded.state_dict())
    for a, b in zip(target.layers, other.layers, strict=True):
        assert relative_error(a.P, b.P) < 1e-6


@pytest.mark.parametrize("exponent", [2, 4])
def test_other_exponents_are_refused(exponent):
    with pytest.raises(ValueError, match=r"fresh_mean with exponent=.*exponent=1"):
        ActivationPreconditioner(mlp(), gamma=GAMMA, fresh_mean=True, exponent=exponent)


def test_an_embedding_has_no_mean():
    layer = nn.Embedding(5, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    preconditioner = ActivationPreconditioner(
        layer, gamma=GAMMA, fresh_mean=True, embeddings=True
    ).attach(optimizer)
    layer(torch.tensor([0, 1, 1])).square().sum().backward()
    optimizer.step()
    assert preconditioner.layers[0].mean.numel() == 0


def test_a_convolution_takes_the_mean_of_its_patches():
    layer, x = nn.Conv2d(2, 3, 2), randn(2, 2, 4, 4, seed=3) + 1
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    preconditioner = ActivationPreconditioner(layer, gamma=GAMMA, fresh_mean=True)
    preconditioner.attach(optimizer)
    layer(x).square().sum().backward()
    optimizer.step()
    patches = nn.functional.unfold(x, 2).mT.reshape(-1, 8)
    assert relative_error(preconditioner.layers[0].mean[0], patches.mean(0)) < 1e-6


def trained(run, **settings):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"fresh_mean": True, "refresh_every": 3, "collect_every": 3} | settings
    ActivationPreconditioner(model, gamma=GAMMA, **settings).attach(optimizer)
    forward = run(model)
    for number in range(4):
        optimizer.zero_grad()
        x, target = regression(number)
        (forward(x) - target).square().mean().backward()
        optimizer.step()
    return list(model.parameters())


RUNS = {
    "compile": partial(torch.compile, backend="aot_eager"),
    "inductor": torch.compile,
    "checkpoint": lambda model: lambda x: checkpoint(model, x, use_reentrant=False),
}


@pytest.mark.parametrize(
    "run", [pytest.param(x, marks=[pytest.mark.slow] if x == "inductor" else []) for x in RUNS]
)
def test_compiled_and_checkpointed_training_equal_eager_training(run):
    torch._dynamo.reset()
    for a, b in zip(trained(RUNS[run]), trained(lambda model: model), strict=True):
        assert relative_error(a, b) < 1e-5
