"""An optimizer that is not attached is reported if it steps with a gradient that is still G."""

import gc
import weakref

import pytest
import pytorch_optimizer as others
import torch
from torch.optim import optimizer as torch_optimizer

from optim import ActivationPreconditioner
from tests.optim.models import backward, mlp
from tests.optim.runs import made, train


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def global_hooks():
    return {*torch_optimizer._global_optimizer_post_hooks.values()}


@pytest.mark.parametrize("settings", [{}, {"refresh_every": 4, "collect_every": 4}], ids=str)
def test_an_optimizer_that_is_made_after_attach_is_reported_once_with_the_cure(settings):
    parts = made(**settings)
    train(parts, range(1))
    late = torch.optim.AdamW(parts[0].parameters(), lr=1e-3)
    with pytest.warns(RuntimeWarning, match=r"AdamW is not .* [02]\.weight .*detach\(\)") as caught:
        train((parts[0], late, None), range(3))
    assert [each.filename for each in caught] == [train.__code__.co_filename]


def test_a_step_with_a_closure_is_reported_too():
    model, _, preconditioner = made()
    late = torch.optim.LBFGS(model.parameters(), max_iter=2)
    with pytest.warns(RuntimeWarning, match="LBFGS is not attached"):
        late.step(lambda: backward(model))
    assert preconditioner.layers[0].step == 0


@pytest.mark.parametrize("is_paused", [True, False])
def test_a_step_without_a_gradient_that_counts_is_not_reported(is_paused):
    model, _, preconditioner = made()
    late = sgd(model)
    late.step()
    if is_paused:
        with preconditioner.paused():
            backward(model)
    else:
        backward(model)
        late.zero_grad()
    late.step()


def test_a_step_after_the_gradients_were_preconditioned_is_not_reported():
    model, optimizer, _ = made()
    backward(model)
    optimizer.step()
    sgd(model).step()


def test_an_optimizer_of_other_weights_is_not_reported():
    model = mlp()
    preconditioner = ActivationPreconditioner(model, gamma=0.1, exclude=["2"])
    preconditioner.attach(sgd(model[0]))
    backward(model)
    sgd(model[2]).step()


@pytest.mark.parametrize("name", ["SAM", "Lookahead"])
def test_a_wrapper_of_an_attached_optimizer_is_not_reported(name):
    model = mlp()
    if name == "SAM":
        wrapper = others.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        inner = wrapper.base_optimizer
    else:
        inner = sgd(model)
        wrapper = others.Lookahead(inner)
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(inner)
    for step in range(6):
        backward(model, step)
        wrapper.step(lambda step=step: backward(model, step))
        wrapper.zero_grad()
    assert [layer.step for layer in preconditioner.layers] == [6, 6]


def test_every_preconditioner_reports_its_own_weights():
    runs = made(), made()
    for model, *_ in runs:
        backward(model)
    for model, *_ in runs:
        with pytest.warns(RuntimeWarning, match="SGD is not attached"):
            sgd(model).step()


def test_detach_and_a_failed_attach_leave_no_hook():
    before = global_hooks()
    model, _, preconditioner = made()
    (hook,) = global_hooks() - before
    preconditioner.detach()
    assert hook not in global_hooks()
    with pytest.raises(ValueError, match="is in 0 of them"):
        ActivationPreconditioner(model, gamma=0.1).attach(sgd(mlp()))
    assert global_hooks() <= before
    backward(model)
    sgd(model).step()


def test_a_preconditioner_that_is_dropped_is_freed_and_its_hook_removed_at_the_next_attach():
    before = global_hooks()
    parts = made()
    (hook,) = global_hooks() - before
    train(parts, range(1))
    dropped = weakref.ref(parts[2])
    del parts
    gc.collect()
    assert dropped() is None
    sgd(mlp()).step()
    made()
    assert hook not in global_hooks()
