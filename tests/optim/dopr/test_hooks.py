"""Every step is preconditioned exactly once: wrappers, subclasses, reused gradients."""

import pytest
import pytorch_optimizer as others
import torch
from torch import nn

from optim import ActivationPreconditioner
from tests.optim.models import backward, covariance, mlp, oracle, recorded, relative_error
from tests.optim.runs import made, train

# -- optimizers that wrap optimizers


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


WRAPPERS = {  # class name: (constructor, attribute that holds the wrapped optimizer)
    "SAM": (lambda m: others.SAM(m.parameters(), torch.optim.SGD, lr=0.1), "base_optimizer"),
    "Lookahead": (lambda m: others.Lookahead(sgd(m)), "optimizer"),
    "PCGrad": (lambda m: others.PCGrad(sgd(m)), "optimizer"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_is_refused_and_the_optimizer_to_attach_named(name):
    model = mlp()
    preconditioner = ActivationPreconditioner(model, gamma=0.1)
    make, attribute = WRAPPERS[name]
    wrapper = make(model)
    with pytest.raises(ValueError, match=f"{name} wraps .* attach its '{attribute}' instead"):
        preconditioner.attach(wrapper)
    assert preconditioner.attach(getattr(wrapper, attribute)) is preconditioner


def test_sam_is_preconditioned_through_its_base_optimizer():
    model = mlp()
    sam = others.SAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=0.05)
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(sam.base_optimizer)
    for step in range(3):
        with preconditioner.paused():
            backward(model, step)
        sam.first_step(zero_grad=True)
        with recorded(model[0]) as (inputs,):
            backward(model, step)
        G = model[0].weight.grad.clone()
        sam.second_step()
        assert relative_error(model[0].weight.grad, oracle(G, covariance(*inputs), 0.1)) < 1e-5
        sam.zero_grad()
    assert "steps: 3, refreshes: 3" in preconditioner.summary()


def test_the_summary_says_how_many_steps_and_refreshes_there_were():
    parts = made(refresh_every=2)
    assert "steps: 0, refreshes: 0" in parts[2].summary()
    train(parts, range(3))
    assert "steps: 3, refreshes: 2" in parts[2].summary()
    parts[2].layers[0].step = 1
    assert "steps: 1 to 3, refreshes: 2" in parts[2].summary()


class HooklessWrapper(torch.optim.Optimizer):
    """Wrap an optimizer without calling Optimizer.__init__, so that there are no hooks."""

    def __init__(self, inner):
        self.inner = [inner]
        self.param_groups = inner.param_groups

    def step(self, closure=None):
        return self.inner[0].step(closure)


def test_an_optimizer_without_hooks_is_refused_and_the_others_keep_none():
    model = mlp()
    preconditioner = ActivationPreconditioner(model, gamma=0.1)
    first, second = sgd(model[0]), HooklessWrapper(sgd(model[2]))
    with pytest.raises(
        TypeError, match=r"HooklessWrapper has no step hooks.*attach that one instead"
    ):
        preconditioner.attach(first, second)
    assert not first._optimizer_step_pre_hooks
    preconditioner.attach(first, second.inner[0])


def test_a_failure_at_the_second_optimizer_takes_the_first_hook_back(monkeypatch):
    model = mlp()
    preconditioner = ActivationPreconditioner(model, gamma=0.1)
    first, second = sgd(model[0]), sgd(model[2])
    with monkeypatch.context() as patch:
        patch.setattr(second, "register_step_pre_hook", None)
        with pytest.raises(TypeError, match="not callable"):
            preconditioner.attach(first, second)
    assert not first._optimizer_step_pre_hooks
    preconditioner.attach(first, second)
    assert len(first._optimizer_step_pre_hooks) == 1


# -- a step inside a step

torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # makes torch wrap SGD.step with hooks


class Child(torch.optim.SGD):
    """Halve the gradients, call the step of the parent class, and raise if `fails` is set."""

    fails = False

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.mul_(0.5)
        super().step()
        if self.fails:
            raise ZeroDivisionError
        return loss


def make_flat(model):
    """Make all gradients views of one buffer, as wrappers for communication do."""
    parameters = list(model.parameters())
    flat = torch.zeros(sum(p.numel() for p in parameters))
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)


def stepped(model, optimizer, preconditioner, step, closure=False):
    """Take one step; return the gradient of each layer, and G P with the P that was used."""
    Gs = []

    def compute():
        optimizer.zero_grad(set_to_none=False)
        loss = backward(model, step)
        Gs.extend(layer.covered.weight.grad.clone() for layer in preconditioner.layers)
        return loss

    if closure:
        optimizer.step(compute)
    else:
        compute()
        optimizer.step()
    layers = preconditioner.layers
    expected = [G @ layer.P[0] for G, layer in zip(Gs, layers, strict=True)]
    return [layer.covered.weight.grad for layer in layers], expected


@pytest.mark.parametrize(
    "settings", [{}, {"refresh_every": 10}, {"refresh_every": 2, "collect_every": 2}], ids=str
)
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("is_flat", [False, True])
def test_a_step_that_edits_gradients_and_calls_its_parents_preconditions_once(
    settings, closure, is_flat
):
    model = mlp()
    if is_flat:
        make_flat(model)
    optimizer = Child(model.parameters(), lr=0.1)
    preconditioner = ActivationPreconditioner(model, gamma=0.1, **settings).attach(optimizer)
    for step in range(4):
        got, expected = stepped(model, optimizer, preconditioner, step, closure)
        for M, reference in zip(got, expected, strict=True):
            torch.testing.assert_close(2 * M, reference)
    assert [layer.step for layer in preconditioner.layers] == [4, 4]


@pytest.mark.parametrize("is_flat", [False, True])
def test_a_step_that_raised_does_not_hide_the_next(is_flat):
    model = mlp()
    if is_flat:
        make_flat(model)
    optimizer = Child(model.parameters(), lr=0.1)
    settings = {"gamma": 0.1, "refresh_every": 8, "collect_every": 8}
    preconditioner = ActivationPreconditioner(model, **settings).attach(optimizer)
    for step in range(4):  # the last three collect nothing
        optimizer.fails = step == 1
        if optimizer.fails:
            with pytest.raises(ZeroDivisionError):
                stepped(model, optimizer, preconditioner, step)
        else:
            got, expected = stepped(model, optimizer, preconditioner, step)
            for M, reference in zip(got, expected, strict=True):
                torch.testing.assert_close(2 * M, reference)
    assert [layer.step for layer in preconditioner.layers] == [4, 4]


def test_a_step_inside_the_handling_of_a_failed_one_is_a_step():
    model = mlp()
    optimizer = Child(model.parameters(), lr=0.1)
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    optimizer.fails = True
    try:
        stepped(model, optimizer, preconditioner, 0)
    except ZeroDivisionError:
        optimizer.fails = False
        got, expected = stepped(model, optimizer, preconditioner, 1)
    torch.testing.assert_close(2 * got[0], expected[0])


class OfLosses(torch.optim.SGD):
    """Take the loss as the first argument of `step`."""

    def step(self, loss=None):
        super().step()
        return loss


@pytest.mark.parametrize("by_name", [False, True])
def test_an_argument_that_is_no_closure_is_passed_on(by_name):
    model = mlp()
    optimizer = OfLosses(model.parameters(), lr=0.1)
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    loss = backward(model)
    G = model[0].weight.grad.clone()
    assert (optimizer.step(loss=loss) if by_name else optimizer.step(loss)) == loss
    torch.testing.assert_close(model[0].weight.grad, G @ preconditioner.layers[0].P[0])


# -- gradients that were already preconditioned


@pytest.mark.parametrize("refresh_every", [1, 4])
def test_a_gradient_rewritten_through_data_is_preconditioned_again(refresh_every):
    model, optimizer, preconditioner = made(refresh_every=refresh_every)
    shadow = mlp()  # not preconditioned, so that its gradients are G
    for step in range(4):
        shadow.zero_grad()
        shadow.load_state_dict(model.state_dict())
        backward(shadow, step)
        held = [p.grad for p in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = None
        backward(model, step)  # captures the activations
        for p, grad, theirs in zip(model.parameters(), held, shadow.parameters(), strict=True):
            if grad is not None:
                p.grad = grad
                p.grad.data.copy_(theirs.grad)
        optimizer.step()
        G, P = shadow[0].weight.grad, preconditioner.layers[0].P[0]
        torch.testing.assert_close(model[0].weight.grad, G @ P)


@pytest.mark.parametrize("refresh_every", [1, 4])
@pytest.mark.parametrize("discards", [False, True])
def test_a_step_without_a_backward_uses_the_same_m(refresh_every, discards):
    model, optimizer, preconditioner = made(refresh_every=refresh_every)
    make_flat(model)
    for step in range(3):
        optimizer.zero_grad(set_to_none=False)
        backward(model, step)
        optimizer.step()
        M = model[0].weight.grad.clone()
        if discards:
            preconditioner.discard()
        optimizer.step()
        assert torch.equal(model[0].weight.grad, M)


def test_a_forward_that_others_put_around_ours_is_not_replaced_by_the_next_preconditioner():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    first = ActivationPreconditioner(model, gamma=0.1)
    inner = model[0].forward
    model[0].forward = lambda x: 2 * inner(x)  # pyright: ignore
    first.detach()
    second = ActivationPreconditioner(model, gamma=0.1)
    assert "0.weight (its forward was replaced on the instance" in second.summary()
    x = torch.ones(3, 4)
    torch.testing.assert_close(model[:1](x), 2 * nn.functional.linear(x, *model[0].parameters()))
