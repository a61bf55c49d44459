"""Gradients of gradients are right, and an optimizer that takes them does not disturb Σ."""

import copy

import pytest
import pytorch_optimizer as others
import torch
from torch import nn

from optim import ActivationPreconditioner
from tests.optim.models import backward, covariance, mlp, oracle, randn, regression, relative_error

DOUBLE = torch.float64
CYCLE = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")  # torch's own


def cases():
    """Return {name: (module, input)} in fp64."""
    return {
        "linear": (nn.Linear(4, 3), randn(5, 4, seed=1, dtype=DOUBLE)),
        "linear without bias": (nn.Linear(4, 3, bias=False), randn(5, 4, seed=1, dtype=DOUBLE)),
        "convolution": (nn.Conv2d(2, 3, 2), randn(2, 2, 3, 3, seed=2, dtype=DOUBLE)),
    }


@pytest.mark.parametrize("name", cases())
def test_first_and_second_derivatives_equal_numerical_ones(name):
    module, x = cases()[name]
    module.double()
    ActivationPreconditioner(module, gamma=0.1)
    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    names = [key for key, _ in module.named_parameters()]

    def function(x, *parameters):
        for key, parameter in zip(names, parameters, strict=True):
            delattr(module, key)
            setattr(module, key, parameter)
        return torch.tanh(module(x))

    module.__class__ = type("Settable", (type(module),), {"__setattr__": object.__setattr__})
    for key in names:
        module._parameters.pop(key)
        object.__setattr__(module, key, None)
    inputs = (x.requires_grad_(), *parameters)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def penalised(model, x):
    """Return a loss with the squared norm of its gradient with respect to x."""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return grad.square().sum() + model(x).square().mean()


def test_the_gradient_of_a_gradient_penalty_equals_that_without_capture():
    plain, model, x = mlp(), mlp(), regression()[0]
    ActivationPreconditioner(model, gamma=0.1)
    for each in (plain, model):
        penalised(each, x).backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@CYCLE
@pytest.mark.parametrize("name", ["AdaHessian", "SophiaH"])
def test_an_optimizer_with_second_derivatives_gets_m_and_leaves_sigma_alone(name):
    model, plain = mlp(), mlp()
    optimizers = []
    for each in (model, plain):
        torch.manual_seed(0)
        optimizers.append(getattr(others, name)(each.parameters(), lr=1e-2))
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(optimizers[0])
    for number in range(3):
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            x, target = regression(number)
            (each(x) - target).square().mean().backward(create_graph=True)
            if each is plain:  # the same with M in place of G
                hidden = torch.tanh(plain[0](x)).detach()
                for layer, z in ((plain[0], x), (plain[2], hidden)):
                    M = oracle(layer.weight.grad.detach(), covariance(z), 0.1).float()
                    layer.weight.grad.data.copy_(M)
            torch.manual_seed(number)  # both draw the same random directions
            optimizer.step()
        assert [int(layer.capture.count) for layer in preconditioner.layers] == [0, 0]
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert relative_error(a, b) < 1e-4


@CYCLE
def test_a_step_that_raises_does_not_stop_the_capture():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise ZeroDivisionError

    model = mlp()
    optimizer = Broken(model.parameters(), lr=0.1)
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    (model(regression()[0])).square().mean().backward(create_graph=True)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    optimizer.zero_grad()
    backward(model)
    assert [int(layer.capture.count) for layer in preconditioner.layers] == [64, 64]


@CYCLE
@pytest.mark.parametrize("is_skipped", [True, False])
def test_a_step_that_raises_does_not_change_the_sums_of_the_next(is_skipped):
    class Broken(torch.optim.SGD):
        is_broken = True

        def step(self, closure=None):
            if self.is_broken:
                raise ZeroDivisionError
            return super().step(closure)

    model = mlp()
    optimizer = Broken(model.parameters(), lr=0.1)
    preconditioner = ActivationPreconditioner(model, gamma=0.1, refresh_every=4).attach(optimizer)
    (model(regression()[0])).square().mean().backward(create_graph=True)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    optimizer.zero_grad()
    if is_skipped:
        preconditioner.discard()
        assert preconditioner._sums_before_step == []
    optimizer.is_broken = False
    backward(model)
    optimizer.step()
    assert [int(layer.capture.count) for layer in preconditioner.layers] == [64, 64]


def test_a_copy_can_be_differentiated_twice():
    model = mlp()
    ActivationPreconditioner(model, gamma=0.1)
    twin = copy.deepcopy(model)
    penalised(twin, regression()[0]).backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())
