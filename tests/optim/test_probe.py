"""What a few steps on small parameters tell about a class of optimizers."""

import random

import numpy as np
import pytest
import torch
from torch.optim import Optimizer

from optim import probe
from optim.build import problems_of
from optim.third_party import find


class Sgd(Optimizer):
    """W <- W - lr · G, to build faulty classes from."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def factor(self, param):
        return 1.0

    @torch.no_grad()
    def step(self, closure=None):
        self.loss = closure() if closure else 0.0
        for group in self.param_groups:
            for param in group["params"]:
                param -= group["lr"] * self.factor(param) * param.grad


class Forgetful(Sgd):
    """Counts its steps in an attribute, which is in no state_dict."""

    n = 0

    def factor(self, param):
        self.n += 1
        return 1 / self.n


class Stateful(Sgd):
    """Counts its steps in its state."""

    def factor(self, param):
        self.state[param]["n"] = self.state[param].get("n", 0) + 1
        return 1 / self.state[param]["n"]


class Unsaved(Sgd):
    """Has an object in its state that no safe reader loads."""

    def factor(self, param):
        self.state[param]["generator"] = random.Random()
        return 1.0


class Random(Sgd):
    """Draws from three generators."""

    def factor(self, param):
        return torch.rand(()).item() + random.random() + np.random.random()


class UsesLoss(Sgd):
    def factor(self, param):
        return 1.0 + float(self.loss)


class IgnoresRate(Sgd):
    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = 0.1
        super().step(closure)


class KeepsRate(Sgd):
    """Uses the learning rate that it was built with."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.lr = lr

    def factor(self, param):
        return self.lr / self.param_groups[0]["lr"]


class Global(Sgd):
    def factor(self, param):
        self.state["n"] = {"steps": 1}
        return 1.0


class ExtraState(Sgd):
    def state_dict(self):
        return super().state_dict() | {"n": 1}


class Infinite(Sgd):
    def factor(self, param):
        self.state[param]["best"] = float("inf")
        return 1.0


class Nested(Sgd):
    def factor(self, param):
        self.state[param]["sums"] = [param.grad.clone()]
        return 1.0


class Idle(Sgd):
    def factor(self, param):
        return 0.0


class Explodes(Sgd):
    def factor(self, param):
        return float("inf")


class Fails(Sgd):
    def factor(self, param):
        raise RuntimeError("no factor\nat all")


class NormOfAll(Sgd):
    """Elementwise but for a scale that all parameters share."""

    def factor(self, param):
        params = [each for group in self.param_groups for each in group["params"]]
        return 1 / sum(each.grad.norm() for each in params)


def of(kind):
    return find(f"{__name__}:{kind.__name__}")


@pytest.mark.parametrize("kind", [Sgd, Stateful, Random, NormOfAll, Nested])
def test_a_sound_class_passes(kind):
    probe.check(of(kind))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Forgetful, "does not continue from its state_dict"),
        (Unsaved, "is not made of tensors and numbers that can be saved and loaded: Unpickling"),
        (UsesLoss, "uses the loss that a closure returns"),
        (IgnoresRate, "does not use the learning rate of every step"),
        (KeepsRate, "does not use the learning rate of every step"),
        (Global, r"keeps state that belongs to no parameter \(state\['n'\]\)"),
        (ExtraState, r"keeps state that belongs to no parameter \(n\)"),
        (Infinite, "the state of Infinite is not finite"),
        (Idle, "changes no weight in 12 steps"),
        (Explodes, "turns finite gradients into weights that are not finite"),
        (Fails, "fails on three small parameters: RuntimeError: no factor$"),
    ],
)
def test_a_faulty_class_is_refused_with_its_fault(kind, message):
    with pytest.raises(ValueError, match=message):
        probe.check(of(kind))


@pytest.mark.parametrize(
    ("name", "is_elementwise", "is_scale_invariant"),
    [
        ("torch:adamw", True, True),
        ("lion", True, True),
        pytest.param("signsgd", True, True, marks=pytest.mark.slow),
        ("torch:sgd", True, False),
        pytest.param(
            "yogi", True, False, marks=pytest.mark.slow
        ),  # its second moment begins at a constant
        ("soap", False, True),
        pytest.param("lamb", False, True, marks=pytest.mark.slow),
        pytest.param("torch:adafactor", False, True, marks=pytest.mark.slow),
        pytest.param("torch:muon", False, True, marks=pytest.mark.slow),
        ("dadaptadam", False, True),  # one scale for all parameters
        ("prodigy", False, False),
    ],
)
def test_known_classes_have_their_known_properties(name, is_elementwise, is_scale_invariant):
    third = find(name)
    assert probe.is_elementwise(third) == is_elementwise
    assert probe.is_scale_invariant(third) == is_scale_invariant


def test_a_scale_that_all_parameters_share_is_not_elementwise():
    assert not probe.is_elementwise(of(NormOfAll))
    assert probe.is_elementwise(of(Sgd))


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("torch:adamw", "", True),
        ("torch:adam", "", False),
        ("torch:nadam", "", False),
        ("torch:nadam", "decoupled_weight_decay=true", True),
        ("lion", "", True),
        ("lion", "weight_decouple=false", False),
    ],
)
def test_decoupled_decay_is_recognized(name, arguments, expected):
    assert probe.has_decoupled_decay(find(name, arguments)) == expected


def test_the_generators_of_the_caller_are_kept():
    def draws():
        return torch.rand(3).tolist(), random.random(), np.random.random()

    probe.seed_all(3)
    expected = draws()
    probe.seed_all(3)
    probe.check(find("kron"))  # draws from two of them
    assert draws() == expected


@pytest.mark.parametrize(
    ("name", "arguments", "asked", "message"),
    [
        ("soap", "", {"is_sharded": True}, "may be in other processes; use parallel=ddp"),
        ("lion", "", {"is_sharded": True}, ""),
        ("soap", "", {"is_wider": True}, "its muP rule is not known"),
        ("torch:sgd", "", {"is_wider": True}, "its muP rule is not known"),
        ("torch:nadam", "", {"is_wider": True}, "that of this class is not"),
        ("torch:nadam", "decoupled_weight_decay=true", {"is_wider": True}, ""),
        ("torch:nadam", "", {"is_wider": True, "weight_decay": 0.0}, ""),
        ("adopt", "", {"is_sharded": True}, "only with --optimizer_args=foreach=false"),
        ("adopt", "foreach=false", {"is_sharded": True}, ""),
        ("diffgrad", "", {"is_sharded": True}, "torch has not all of its operations for shards"),
        (f"{__name__}:Nested", "", {"is_sharded": True}, "is nested, and cannot be sharded"),
        ("soap", "", {}, ""),
    ],
)
def test_what_a_class_cannot_do_is_said_with_a_remedy(name, arguments, asked, message):
    asked = {"is_sharded": False, "is_wider": False, "weight_decay": 0.1} | asked
    problems = problems_of(find(name, arguments), **asked)
    assert len(problems) == bool(message)
    assert message in "".join(problems)
