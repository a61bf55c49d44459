"""Names do not depend on the wrappers around a model, and patterns take what the report prints."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from optim import ActivationPreconditioner
from tests.optim.models import randn


def model():
    return nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4)), "lm_head": nn.Linear(4, 4)})


def checkpointed():
    each = model()
    each["body"][0] = checkpoint_wrapper(each["body"][0])
    return each


def compiled_inside():
    each = model()
    each["body"] = torch.compile(each["body"])
    return each


WRAPPED = {
    "plain": model,
    "compile": lambda: torch.compile(model()),
    "compile inside": compiled_inside,
    "average": lambda: AveragedModel(model()),
    "data parallel": lambda: nn.DataParallel(model()),
    "both": lambda: torch.compile(nn.DataParallel(model())),
    "checkpoint": checkpointed,
}


@pytest.mark.parametrize("how", WRAPPED)
def test_names_are_those_of_the_plain_model(how):
    preconditioner = ActivationPreconditioner(WRAPPED[how](), gamma=0.1)
    assert [layer.name for layer in preconditioner.layers] == ["body.0", "lm_head"]
    assert [row["name"] for row in preconditioner.report()] == ["body.0.weight", "lm_head.weight"]


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("pattern", ["lm_head", "lm_head.weight", "lm_*"])
def test_patterns_match_names_and_what_the_report_prints(how, pattern):
    preconditioner = ActivationPreconditioner(WRAPPED[how](), gamma=0.1, exclude=[pattern])
    assert [layer.name for layer in preconditioner.layers] == ["body.0"]


@pytest.mark.parametrize("name", ["module.lm_head", "module.lm_head.weight"])
def test_patterns_also_match_the_names_that_the_wrapped_model_has(name):
    wrapped = AveragedModel(model())
    preconditioner = ActivationPreconditioner(wrapped, gamma=0.1, exclude=[name])
    assert [layer.name for layer in preconditioner.layers] == ["body.0"]


def trained():
    """Return a preconditioner of the plain model after a step."""
    each = model()
    optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
    preconditioner = ActivationPreconditioner(each, gamma=0.1).attach(optimizer)
    each["lm_head"](each["body"](randn(9, 4, seed=0))).square().sum().backward()
    optimizer.step()
    return preconditioner


def assert_loaded(preconditioner, expected):
    assert preconditioner.state_dict().keys() == expected.keys() == {"body.0", "lm_head"}
    for layer in preconditioner.layers:
        assert layer.sigma.any()
        assert torch.equal(layer.sigma, expected[layer.name]["sigma"])


@pytest.mark.parametrize("how", WRAPPED)
def test_a_state_loads_into_a_wrapped_model_and_back(how):
    state = trained().state_dict()
    wrapped = ActivationPreconditioner(WRAPPED[how](), gamma=0.1)
    wrapped.load_state_dict(state)
    assert_loaded(wrapped, state)
    plain = ActivationPreconditioner(model(), gamma=0.1)
    plain.load_state_dict(wrapped.state_dict())
    assert_loaded(plain, state)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_state_saved_with_the_names_of_a_wrapped_model_loads(prefix):
    state = trained().state_dict()
    preconditioner = ActivationPreconditioner(model(), gamma=0.1)
    preconditioner.load_state_dict({f"{prefix}{name}": each for name, each in state.items()})
    assert_loaded(preconditioner, state)


def test_a_module_that_is_called_module_keeps_its_name_beside_others():
    each = nn.ModuleDict({"module": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    preconditioner = ActivationPreconditioner(each, gamma=0.1)
    assert [layer.name for layer in preconditioner.layers] == ["module", "other"]
