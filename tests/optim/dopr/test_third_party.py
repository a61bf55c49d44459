"""Third-party optimizers behave exactly as if they were given M as the gradient."""

import copy

import pytest
import pytorch_optimizer as others
import torch
from torch import nn
from torch.optim import lr_scheduler

from optim import ActivationPreconditioner
from tests.optim.models import (
    backward,
    covariance,
    mlp,
    oracle,
    recorded,
    regression,
    relative_error,
)

OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW for loop": (torch.optim.AdamW, {"foreach": False}),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {"amsgrad": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 1e-3}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {"lr": 5e-2}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "Adamax": (torch.optim.Adamax, {}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.1}),
    "Rprop": (torch.optim.Rprop, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
}
OTHERS = {
    "AdaBelief": {},
    "AdaFactor": {},
    "ADOPT": {},
    "AdamP": {},
    "Adan": {},
    "AdEMAMix": {},
    "CAME": {"lr": 1e-3},
    "DAdaptAdam": {"lr": 1.0},
    "Kron": {"balance_prob": 0.0},  # otherwise it uses its own random generator
    "Lamb": {},
    "LARS": {"lr": 1.0},
    "Lion": {},
    "MADGRAD": {},
    "MARS": {},
    "Prodigy": {"lr": 1.0},
    "Shampoo": {},
    "SOAP": {},
    "ScheduleFreeAdamW": {},
    "StableAdamW": {},
    "Tiger": {},
    "Yogi": {},
}
OPTIMIZERS |= {name: (getattr(others, name), kwargs) for name, kwargs in OTHERS.items()}


def made(name, model):
    kind, kwargs = OPTIMIZERS[name]
    torch.manual_seed(0)  # some optimizers draw random numbers
    optimizer = kind(model.parameters(), **{"lr": 1e-2} | kwargs)
    if hasattr(optimizer, "train"):
        optimizer.train()  # schedule-free optimizers need it
    return optimizer


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_plain_optimizer_fed_with_the_oracles_m(name):
    model, twin = mlp(), mlp()
    optimizer, plain, Gs, Ms = made(name, model), made(name, twin), [], []
    optimizer.register_step_pre_hook(lambda *_: Gs.append(gradients(model)))
    ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    optimizer.register_step_pre_hook(lambda *_: Ms.append(gradients(model)))
    torch.manual_seed(1)
    for step in range(4):
        with recorded(model[0], model[2]) as calls:
            backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        for i, inputs in enumerate(calls):  # weights are parameters 0 and 2, biases 1 and 3
            expected = oracle(Gs[step][2 * i], covariance(*inputs), 0.1)
            assert relative_error(Ms[step][2 * i], expected) < 2e-5  # fp32 Σ, κ = 100
            assert torch.equal(Ms[step][2 * i + 1], Gs[step][2 * i + 1])
    torch.manual_seed(1)
    for M in Ms:
        for parameter, grad in zip(twin.parameters(), M, strict=True):
            parameter.grad = grad
        plain.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_falls(name):
    model = mlp()
    optimizer = made(name, model)
    ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    losses = []
    for _ in range(20):
        losses.append(backward(model))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 10),
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10),
        lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    ],
)
@pytest.mark.parametrize("made_first", ["scheduler", "preconditioner"])
def test_learning_rate_schedulers_work(schedule, made_first):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = schedule(optimizer) if made_first == "scheduler" else None
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    scheduler = scheduler or schedule(optimizer)
    rates = []
    for step in range(5):
        backward(model)
        optimizer.step()
        plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        scheduler.step(float(step)) if plateau else scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert len(set(rates)) >= 4
    assert preconditioner.layers[0].n_refreshes == 5


@pytest.mark.parametrize("by_keyword", [True, False])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Lion", "Rprop"])
def test_a_closure_is_called_once_and_gives_the_same_step(name, by_keyword):
    model, twin = mlp(), mlp()
    calls, optimizers = [], [made(name, each) for each in (model, twin)]
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        ActivationPreconditioner(each, gamma=0.1).attach(optimizer)

    def closure():
        optimizers[0].zero_grad()
        calls.append(backward(model, len(calls)))
        return calls[-1]

    for step in range(3):
        step_of = optimizers[0].step
        assert (step_of(closure=closure) if by_keyword else step_of(closure)) == calls[-1]
        optimizers[1].zero_grad()
        backward(twin, step)
        optimizers[1].step()
    assert len(calls) == 3
    assert torch.equal(model[0].weight, twin[0].weight)


def test_a_line_search_is_refused():
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    with pytest.raises(RuntimeError, match="LBFGS calls its closure several times"):
        optimizer.step(lambda: backward(model))


def test_several_optimizers_share_one_preconditioner():
    model, twin = mlp(), mlp()
    joint = torch.optim.SGD(twin.parameters(), lr=0.1)
    separate = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
    ActivationPreconditioner(model, gamma=0.1, refresh_every=2).attach(*separate)
    ActivationPreconditioner(twin, gamma=0.1, refresh_every=2).attach(joint)
    for step in range(4):
        for each, optimizers in ((model, separate), (twin, [joint])):
            backward(each, step)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_copied_optimizer_is_plain():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    twin_model, twin = copy.deepcopy((model, optimizer))
    x, _ = regression()
    twin_model(x).sum().backward()
    grad = twin_model[0].weight.grad.clone()
    twin.step()
    assert torch.equal(twin_model[0].weight.grad, grad)
    assert isinstance(twin_model[0], nn.Linear)
