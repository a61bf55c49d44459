"""The schedule of collecting, averaging and inverting equals a direct computation."""

import copy

import pytest
import torch
from torch import nn

from optim import ActivationPreconditioner
from optim.adamuon import AdaMuon
from optim.muon import Muon
from optim.signum import Signum
from tests.optim.models import backward, covariance, mlp, oracle, randn, recorded, relative_error

BASES = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
    "adamw fused": (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    "adamw foreach": (torch.optim.AdamW, {"lr": 1e-2, "foreach": True}),
    "sgd": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    "torch muon": (torch.optim.Muon, {"lr": 1e-2}),
    "muon": (Muon, {"lr": 1e-2}),
    "adamuon": (AdaMuon, {"lr": 1e-2}),
    "signum": (Signum, {"lr": 1e-2}),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"exponent": 4}, {"sigma_beta": 0.9}, {"block_diagonal": 4}, {"trace_normalized": False}],
    ids=str,
)
def test_with_identity_covariance_and_no_damping_it_is_the_base_bit_for_bit(base, settings):
    def trained(dopr):
        layer = nn.Linear(16, 8, bias=False)
        layer.weight.data.copy_(randn(8, 16, seed=1))
        kind, kwargs = BASES[base]
        optimizer = kind(layer.parameters(), **kwargs)
        if dopr:
            ActivationPreconditioner(layer, gamma=0.0, **settings).attach(optimizer)
        for step in range(3):
            y = layer(4 * torch.eye(16))  # Σ = 16 I / 16, exactly
            (y * randn(16, 8, seed=step)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return layer.weight

    assert torch.equal(trained(dopr=True), trained(dopr=False))


def computed_directly(gradients, inputs, *, gamma, beta, refresh_every, collect_every):
    """Return the M of every step of one layer; `gradients` and `inputs` have one item per step."""
    Ms, window, average, n_refreshes = [], [], 0.0, 0
    for step, (G, z) in enumerate(zip(gradients, inputs, strict=True)):
        if step % collect_every == 0:
            window.append(z)
        if step % refresh_every == 0:
            n_refreshes += 1
            decay = beta or 0.0
            average = decay * average + (1 - decay) * covariance(*window)
            sigma, window = average / (1 - decay**n_refreshes), []
        Ms.append(oracle(G, sigma, gamma))
    return Ms


@pytest.mark.parametrize("beta", [None, 0.0, 0.7])
@pytest.mark.parametrize(("refresh_every", "collect_every"), [(1, 1), (3, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_every_m_follows_the_schedule(beta, refresh_every, collect_every, set_to_none):
    model, schedule = mlp(), {"refresh_every": refresh_every, "collect_every": collect_every}
    preconditioner = ActivationPreconditioner(model, gamma=0.1, sigma_beta=beta, **schedule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    preconditioner.attach(optimizer)
    gradients, Ms = [], []
    with recorded(model[2]) as (inputs,):
        for step in range(9):
            backward(model, step, n=20 + step)
            gradients.append(model[2].weight.grad.clone())
            optimizer.step()
            Ms.append(model[2].weight.grad.clone())
            optimizer.zero_grad(set_to_none=set_to_none)
    expected = computed_directly(gradients, inputs, gamma=0.1, beta=beta, **schedule)
    for M, reference in zip(Ms, expected, strict=True):
        assert relative_error(M, reference) < 1e-5  # fp32 rounding of Σ times κ < 100


def test_a_layer_that_missed_its_refresh_makes_up_for_it():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    schedule = {"refresh_every": 2, "collect_every": 2}
    preconditioner = ActivationPreconditioner(model, gamma=0.1, **schedule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner.attach(optimizer)
    for step in range(6):  # layer 1 is used in odd steps only, when no refresh is scheduled
        x = randn(30, 4, seed=step) * (step + 1)
        loss = model[0](x).square().mean()
        if step % 2:
            loss = loss + model[1](x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    steps_seen = [layer.n_refreshes for layer in preconditioner.layers]
    assert steps_seen == [3, 3]
    assert relative_error(preconditioner.layers[1].sigma[0], covariance(x)) < 1e-5


def test_two_optimizers_that_step_at_different_rates_see_what_they_accumulated():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.0) for layer in model]
    ActivationPreconditioner(model, gamma=0.1).attach(*optimizers)
    xs = [randn(30, 4, seed=1), randn(20, 4, seed=2)]
    for x in xs:
        optimizers[0].zero_grad()
        (model[0](x).square().sum() + model[1](x).square().sum()).backward()
        optimizers[0].step()
    G = model[1].weight.grad.clone()
    optimizers[1].step()
    assert relative_error(model[1].weight.grad, oracle(G, covariance(*xs), 0.1)) < 1e-5


def test_parameters_added_later_are_left_alone():
    model, extra = mlp(), nn.Parameter(torch.ones(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    optimizer.add_param_group({"params": [extra]})
    backward(model)
    extra.grad = torch.ones(3, 3)
    optimizer.step()
    assert torch.equal(extra, torch.full((3, 3), 0.5))


def test_biases_and_gains_keep_their_gradient():
    model = nn.Sequential(nn.LayerNorm(12), *mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    backward(model)
    before = copy.deepcopy([p.grad for p in model.parameters()])
    optimizer.step()
    for parameter, grad in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, grad) == (parameter.dim() == 1)
