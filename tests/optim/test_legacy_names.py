"""Settings and states of earlier releases load under their new names, with one warning."""

import copy

import pytest
import torch

from optim import Muon
from optim.legacy_names import STATE, renamed_settings, renamed_state
from tests.optim.models import randn
from tests.optim.runs import assert_same, made, train

OLD_KEYS = {new: old for old, new in STATE.items()}


def test_old_settings_and_values_get_their_new_names():
    old = {"kernel": "triton", "muon_scale": "match_rms", "coefficients": "quintic", "gamma": 0.1}
    settings, found = renamed_settings(old)
    assert settings == {
        "backend": "triton",
        "adjust_lr": "match_rms_adamw",
        "ns_coefficients": "quintic",
        "gamma": 0.1,
    }
    assert found == ["kernel", "muon_scale", "adjust_lr=match_rms", "coefficients"]


def test_new_settings_do_not_change():
    settings = {"backend": "auto", "adjust_lr": "unit_rms_norm", "eval_iters": [1, 2], "out": None}
    assert renamed_settings(settings) == (settings, [])


def test_a_setting_under_both_names_is_refused():
    with pytest.raises(ValueError, match="kernel is the old name of backend: set only backend"):
        renamed_settings({"backend": "auto", "kernel": "torch"})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_state_with_old_keys_loads_with_one_warning():
    settings = {"inverse": "newton_schulz", "refresh_every": 4}
    parts, again = made(**settings), made(**settings)
    train(parts, range(3))
    state = parts[2].state_dict()
    old = {
        name: {OLD_KEYS.get(key, key): value for key, value in layer.items()}
        for name, layer in state.items()
    }
    unchanged = copy.copy(old)
    for part, saved in zip(again[:2], parts[:2], strict=True):
        part.load_state_dict(saved.state_dict())
    with pytest.warns(FutureWarning, match="n_mended -> n_fallbacks") as caught:
        again[2].load_state_dict(old)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert old == unchanged
    assert_same(again, parts)


@pytest.mark.parametrize("state", [None, [1], {"0": None}, {"0": {"n_fallbacks": 0}}])
def test_what_has_no_old_key_is_returned_as_it_is(state):
    assert renamed_state(state) is state


def test_old_param_group_keys_of_muon_are_renamed_with_a_warning():
    param = torch.nn.Parameter(torch.ones(6, 4))
    old = {"params": [param], "blocks": 3, "scale": "match_rms", "coefficients": "quintic"}
    with pytest.warns(FutureWarning, match="blocks -> qkv_blocks"):
        group = Muon([old]).param_groups[0]
    assert (group["qkv_blocks"], group["adjust_lr"]) == (3, "match_rms_adamw")
    assert group["ns_coefficients"] == "quintic"


def step(optimizer: Muon, param: torch.nn.Parameter, seed: int) -> None:
    param.grad = randn(*param.shape, seed=seed)
    optimizer.step()


def test_an_old_state_dict_of_muon_continues():
    settings = {"qkv_blocks": 3, "adjust_lr": "original", "lr": 0.1}
    first, second = (torch.nn.Parameter(torch.ones(6, 4)) for _ in range(2))
    expected, optimizer = Muon([{"params": [first], **settings}]), Muon([second])
    step(expected, first, 0)
    second.data.copy_(first.data)
    state = copy.deepcopy(expected.state_dict())
    group = state["param_groups"][0]
    for new, old in (("qkv_blocks", "blocks"), ("adjust_lr", "scale")):
        group[old] = group.pop(new)
    with pytest.warns(FutureWarning):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0].items() >= settings.items()
    for each, param in ((expected, first), (optimizer, second)):
        step(each, param, 1)
    assert torch.equal(first, second)


def continued_from(old: str, param: torch.nn.Parameter) -> Muon:
    """Return a Muon that loaded a state with an old value of `adjust_lr`."""
    optimizer = Muon([param])
    state = optimizer.state_dict()
    state["param_groups"][0]["adjust_lr"] = old
    optimizer.load_state_dict(state)
    return optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda old, param: Muon([param], adjust_lr=old),
        lambda old, param: Muon([{"params": [param], "adjust_lr": old}]),
        continued_from,
    ],
    ids=["constructor", "group", "state"],
)
def test_an_old_value_of_adjust_lr_is_accepted_with_a_warning(make):
    with pytest.warns(FutureWarning, match="spectral -> unit_rms_norm"):
        optimizer = make("spectral", torch.nn.Parameter(torch.ones(6, 4)))
    assert optimizer.param_groups[0]["adjust_lr"] == "unit_rms_norm"
