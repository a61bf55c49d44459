"""`attach` takes what trainers hand over, and refuses what it cannot precondition by its name."""

import logging

import pytest
import pytorch_optimizer as others
import torch
from torch import nn

from optim import ActivationPreconditioner
from optim.dopr import optimizers as module
from tests.optim.models import backward, mlp


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


class AcceleratedOptimizer:  # as accelerate.optimizer.AcceleratedOptimizer holds it
    def __init__(self, optimizer):
        self.optimizer = optimizer


class LightningOptimizer:  # as lightning.pytorch.core.optimizer.LightningOptimizer holds it
    def __init__(self, optimizer):
        self._optimizer = optimizer


class OptimizersContainer(torch.optim.Optimizer):  # as torchtitan's holds them
    def __init__(self, *optimizers):
        self.optimizers = list(optimizers)


FORMS = {
    "list": lambda optimizer: [optimizer],
    "nested": lambda optimizer: [(optimizer,)],
    "accelerate": AcceleratedOptimizer,
    "lightning": LightningOptimizer,
    "torchtitan": OptimizersContainer,
    "list of a wrapper": lambda optimizer: [AcceleratedOptimizer(optimizer)],
}


@pytest.mark.parametrize("form", FORMS)
def test_lists_containers_and_wrappers_of_trainers_are_attached(form, caplog):
    caplog.set_level(logging.INFO, "dopr")
    model, twin = mlp(), mlp()
    steps = []
    for each, given in ((model, FORMS[form]), (twin, lambda optimizer: optimizer)):
        optimizer = sgd(each)
        ActivationPreconditioner(each, gamma=0.1).attach(given(optimizer))
        backward(each)
        optimizer.step()
        steps.append([parameter.clone() for parameter in each.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))
    assert ("attaching the 1 optimizer" in caplog.text) == (form not in ("list", "nested"))


def test_two_optimizers_may_come_in_one_list():
    model = mlp()
    parts = [sgd(model[0]), sgd(model[2])]
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(parts)
    backward(model)
    for optimizer in parts:
        optimizer.step()
    assert [layer.n_refreshes for layer in preconditioner.layers] == [1, 1]


@pytest.mark.parametrize("name", ["lomo", "adalomo"])
def test_optimizers_that_update_in_the_backward_are_refused(name):
    model = mlp()
    optimizer = others.load_optimizer(name)(model, lr=1e-2)
    with pytest.raises(TypeError, match=r"updates the weights during the backward.*AdamW"):
        ActivationPreconditioner(model, gamma=0.1).attach(optimizer)


def test_an_object_that_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"int is not a torch\.optim\.Optimizer: pass the"):
        ActivationPreconditioner(mlp(), gamma=0.1).attach([3])


def test_zero1_and_its_inner_optimizer_are_refused_with_the_same_cure(monkeypatch):
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        pass

    model = mlp()
    with pytest.raises(ValueError, match=r"ZeRO-1.*use fully_shard"):
        ActivationPreconditioner(mlp(), gamma=0.1).attach(
            ZeroRedundancyOptimizer(model.parameters(), lr=0.1)
        )
    monkeypatch.setattr(module, "n_processes", lambda: 2)
    with pytest.raises(ValueError, match=r"2\.weight is in 0 of them.*ZeRO-1.*use fully_shard"):
        module.check_optimizers([sgd(model[0])], {"0": model[0].weight, "2": model[2].weight})


def test_attach_may_be_repeated_only_after_torch_distributed_was_initialized(monkeypatch):
    model = mlp()
    optimizer = sgd(model)
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    with pytest.raises(ValueError, match="attached already"):
        preconditioner.attach(optimizer)


def test_a_weight_of_the_whole_model_has_a_plain_name():
    preconditioner = ActivationPreconditioner(nn.Linear(3, 2), gamma=0.1)
    assert preconditioner.report()[0]["name"] == "weight"
