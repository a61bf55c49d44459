"""Steps without a backward are not counted; gradients that were thrown away are noticed."""

import copy
import logging

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from optim import ActivationPreconditioner
from tests.optim.models import backward, mlp, regression


def attached(model, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = ActivationPreconditioner(model, gamma=0.1, **settings).attach(optimizer)
    return optimizer, preconditioner


def train(model, optimizer, steps):
    for number in steps:
        optimizer.zero_grad()
        backward(model, number)
        optimizer.step()


@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("zeros", [True, False])
def test_a_step_without_a_backward_changes_nothing(at, zeros):
    results = []
    for is_touched in (False, True):
        model = mlp()
        optimizer, preconditioner = attached(model, refresh_every=4)
        train(model, optimizer, range(at))
        if is_touched:
            optimizer.zero_grad()
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if zeros else None
            before = copy.deepcopy(preconditioner.state_dict())
            optimizer.step()
            after = preconditioner.state_dict()
            for name, layer in before.items():
                assert layer["step"] == after[name]["step"]
                assert torch.equal(layer["gram"], after[name]["gram"])
        train(model, optimizer, range(at, 9))
        results.append([parameter.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_checkpoint_helpers_of_torch_do_not_shift_the_schedule():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    preconditioner = ActivationPreconditioner(model, gamma=0.1, refresh_every=4).attach(optimizer)
    get_optimizer_state_dict(model, optimizer)  # takes a step with zero gradients
    assert [layer.step for layer in preconditioner.layers] == [0, 0]
    train(model, optimizer, range(5))
    assert [layer.n_refreshes for layer in preconditioner.layers] == [2, 2]


@pytest.mark.parametrize("at", [4, 5, 6])
def test_the_checkpoint_helpers_of_torch_change_nothing_after_a_load(at):
    model = mlp()
    optimizer, preconditioner = attached(model, refresh_every=4)
    train(model, optimizer, range(at))
    state = preconditioner.state_dict()
    resumed = mlp()
    optimizer = torch.optim.AdamW(resumed.parameters())
    preconditioner = ActivationPreconditioner(resumed, gamma=0.1, refresh_every=4).attach(optimizer)
    preconditioner.load_state_dict(state)
    get_optimizer_state_dict(resumed, optimizer)
    for name, layer in preconditioner.state_dict().items():
        assert layer["step"] == at
        assert layer["n_refreshes"] == state[name]["n_refreshes"]
        assert layer["count"] == state[name]["count"]


def test_a_step_whose_tokens_are_all_masked_is_counted_whether_or_not_it_refreshes():
    model = mlp()
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer, preconditioner = attached(model, refresh_every=2)
    for number in range(4):
        optimizer.zero_grad()
        backward(model, number, scale=0.0)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert [layer.step for layer in preconditioner.layers] == [4, 4]


def warnings_of(caplog):
    return [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]


def test_a_gradient_that_was_thrown_away_is_reported_once(caplog):
    model = mlp()
    optimizer, _ = attached(model)
    for _ in range(3):
        backward(model)
        optimizer.zero_grad()
    (warning,) = warnings_of(caplog)
    assert "paused()" in warning
    assert "discard()" in warning


def accumulated(model, optimizer, preconditioner):
    for number in range(3):
        backward(model, number)
    optimizer.step()


def discarded(model, optimizer, preconditioner):
    backward(model)
    optimizer.zero_grad()
    preconditioner.discard()


def paused(model, optimizer, preconditioner):
    with preconditioner.paused():
        backward(model)
    optimizer.zero_grad()


def second_derivatives(model, optimizer, preconditioner):
    for number in range(2):
        x, target = regression(number)
        (model(x) - target).square().mean().backward(create_graph=True)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")  # torch's own
@pytest.mark.parametrize("use", [accumulated, discarded, paused, second_derivatives])
def test_correct_use_is_not_reported(caplog, use):
    model = mlp()
    optimizer, preconditioner = attached(model)
    for _ in range(2):
        use(model, optimizer, preconditioner)
        optimizer.zero_grad()
        train(model, optimizer, range(2))
    assert warnings_of(caplog) == []


def rolled_back(model, optimizer, preconditioner):
    state = preconditioner.state_dict()
    backward(model)
    preconditioner.load_state_dict(state)


def behind_a_zero_head(model, optimizer, preconditioner):
    x, _ = regression(0)
    (0 * model(x)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("use", [rolled_back, behind_a_zero_head])
def test_gradients_without_counted_tokens_are_not_reported(caplog, use):
    model = mlp()
    optimizer, preconditioner = attached(model)
    use(model, optimizer, preconditioner)
    optimizer.zero_grad()
    train(model, optimizer, range(2))
    assert warnings_of(caplog) == []
