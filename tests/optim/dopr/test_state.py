"""Resuming is exact. A state of other settings is adapted; a state of other layers is rejected."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from optim import ActivationPreconditioner
from optim.kernels import damped_root
from tests.optim.models import backward, covariance, mlp, oracle, recorded, relative_error
from tests.optim.runs import BASES, LAZY, assert_same, made, resumed, train
from trainer.checkpoint.read import CheckpointError
from trainer.checkpoint.state import _restore_preconditioner


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("settings", [{}, LAZY], ids=["exact", "lazy"])
@pytest.mark.parametrize("breaks", [(5,), (3, 7)], ids=["once", "twice"])
def test_a_resumed_run_is_bit_equal(base, settings, breaks):
    whole, parts, start = made(base, **settings), made(base, **settings), 0
    train(whole, range(11))
    for stop in (*breaks, 11):
        parts = resumed(parts, base, **settings)
        train(parts, range(start, stop))
        start = stop
    assert_same(parts, whole)


def test_a_state_that_does_not_fit_is_refused_whole():
    _, _, preconditioner = parts = made()
    train(parts, range(2))
    before = resumed(parts, "sgd")
    state = preconditioner.state_dict()
    state["2"] = state["2"] | {"sigma": torch.zeros(1, 3, 3)}
    state["9"] = state["0"]
    with pytest.raises(
        ValueError, match=r"unexpected 9; 2: sigma is \(1, 3, 3\), but must be \(1, 9, 9\)"
    ):
        preconditioner.load_state_dict(state)
    del state["0"], state["9"], state["2"]["P"]
    with pytest.raises(ValueError, match="missing 0; 2 has no P"):
        preconditioner.load_state_dict(state)
    assert_same(parts, before)


BAD_STATES = {
    "P": (torch.zeros(1, 9, 3), r"2: P is \(1, 9, 3\), but must be \(1, 9, 9\)"),
    "damping": (torch.zeros(3), r"2: damping is \(3,\), but must be \(1,\)"),
    "norm_ratio": (torch.zeros(2), r"2: norm_ratio is \(2,\), but must be \(\)"),
    "gram": (torch.zeros(9, 9), r"2: gram is \(9, 9\), but must be \(1, 9, 9\)"),
    "count": (torch.zeros(1), r"2: count is \(1,\), but must be \(\)"),
    "count < 0": (torch.tensor(-1), r"2: count is -1, but must be an integer >= 0"),
    "count, a fraction": (torch.tensor(2.5), r"2: count is 2\.5, but must be an integer >= 0"),
    "count, infinite": (torch.tensor(math.inf), r"2: count is inf, but must be an integer"),
    "P, sparse": (torch.zeros(1, 9, 9).to_sparse(), r"2: P is sparse or complex, but must be a"),
    "gram, complex": (torch.zeros(1, 9, 9) + 1j, r"2: gram is sparse or complex, but must be a"),
    "sigma": ([1.0], r"2: sigma is a list, but must be a tensor"),
    "step": ("7", r"2: step is '7', but must be an integer"),
    "n_refreshes": (-1, r"2: n_refreshes is -1, but must be an integer >= 0"),
    "made_with": (None, r"2: made_with is None, but must be a dict"),
}


@pytest.mark.parametrize("key", BAD_STATES)
def test_every_tensor_and_number_of_a_state_is_checked(key):
    parts = made()
    train(parts, range(2))
    before, state = resumed(parts), parts[2].state_dict()
    value, message = BAD_STATES[key]
    state["2"] = state["2"] | {key.split()[0].strip(","): value}
    with pytest.raises(ValueError, match=message):
        parts[2].load_state_dict(state)
    assert_same(parts, before)


@pytest.mark.parametrize("key", ["sigma", "P", "damping"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("gamma", [0.1, 0.5], ids=["P is taken", "P is made again"])
def test_a_state_that_is_not_finite_is_refused(key, bad, gamma):
    parts, other = made(), made(gamma=gamma)
    train(parts, range(2))
    before, state = resumed(other, gamma=gamma), parts[2].state_dict()
    state["2"] = state["2"] | {key: torch.full_like(state["2"][key], bad)}
    with pytest.raises(ValueError, match=f"2: {key} is not finite"):
        other[2].load_state_dict(state)
    assert_same(other, before)


def test_a_running_sum_that_was_spoilt_is_saved_and_dropped_later():
    parts = made(refresh_every=2)
    train(parts, range(1))
    parts[0](torch.full((3, 12), math.nan)).sum().backward()
    parts[1].zero_grad()
    parts = resumed(parts, refresh_every=2)
    train(parts, range(1, 3))
    assert [row["fallbacks"] for row in parts[2].report()] == [1, 1]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "it is a NoneType, but must be a dict"),
        ([], "it is a list"),
        ({"0": None, "2": [1]}, "0 is a NoneType, but must be a dict; 2 is a list"),
        ({0: 1}, "missing 0; missing 2; unexpected 0"),
    ],
)
def test_what_is_no_state_at_all_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        made()[2].load_state_dict(state)


def test_all_that_is_wrong_with_a_state_of_other_blocks_is_listed():
    parts, blocked = made(), made(block_diagonal=4)
    train(parts, range(2))
    with pytest.raises(ValueError, match="does not fit") as error:
        blocked[2].load_state_dict(parts[2].state_dict())
    for problem in (
        "0: sigma is (1, 12, 12), but must be (3, 4, 4)",
        "0: P is",
        "2: damping is (1,)",
    ):
        assert problem in str(error.value)


OTHER = [{"gamma": 0.5}, {"exponent": 2}, {"trace_normalized": False}]


@pytest.mark.parametrize("other", OTHER, ids=str)
def test_a_p_of_other_settings_is_made_again_from_the_stored_sigma(other):
    parts = made(refresh_every=10)
    with recorded(parts[0][0]) as (inputs,):
        train(parts, range(2))
    again = resumed(parts, refresh_every=10, **other)
    backward(again[0], 2)
    G = again[0][0].weight.grad.clone()
    again[1].step()  # long before the next refresh
    p = other.pop("exponent", 1)
    expected = oracle(G, covariance(inputs[0]), p=p, **{"gamma": 0.1} | other)
    assert relative_error(again[0][0].weight.grad, expected) < 1e-5  # fp32 rounding, κ < 100
    assert again[2].layers[0].n_refreshes == 1


def test_a_state_before_the_first_refresh_fits_other_settings_too():
    parts = resumed(made(), gamma=0.5)
    train(parts, range(2))
    twin = made(gamma=0.5)
    train(twin, range(2))
    assert_same(parts, twin)


def test_the_same_settings_do_not_make_p_again(monkeypatch):
    parts = made(**LAZY)
    train(parts, range(3))
    monkeypatch.setattr(damped_root, "PROBE_TOLERANCE", -1.0)  # any inverse would now fail
    assert_same(resumed(parts, **LAZY), parts)


def test_a_stored_sigma_without_an_inverse_is_an_error_that_changes_nothing(monkeypatch):
    parts, other = made(), made(gamma=0.5)
    train(parts, range(3))
    train(other, range(2))
    before = resumed(other, gamma=0.5)
    monkeypatch.setattr(damped_root, "PROBE_TOLERANCE", -1.0)
    with pytest.raises(FloatingPointError, match="no inverse after"):
        other[2].load_state_dict(parts[2].state_dict())
    assert_same(other, before)


@pytest.mark.parametrize(
    ("done", "before", "after", "expected"),
    [
        (3, 100, 2, [1, 2, 2, 3]),  # steps 3, 4, 5, 6, of which 4 and 6 are due
        (4, 100, 2, [2, 2, 3, 3]),  # 4 itself is due
        (3, 100, 1, [2, 3, 4, 5]),
        (5, 10, 5, [2, 2, 2, 2]),
        (3, 2, 6, [2, 3, 3, 4]),
    ],
)
def test_a_more_frequent_refresh_holds_from_the_first_step_after_resuming(
    done, before, after, expected
):
    parts = made(refresh_every=before)
    train(parts, range(done))
    parts, seen = resumed(parts, refresh_every=after), []
    for step in range(done, done + 4):
        train(parts, [step])
        seen.append(parts[2].layers[0].n_refreshes)
    assert seen == expected


# -- a state is a snapshot


def tensors(state):
    return [value for layer in state.values() for value in layer.values() if torch.is_tensor(value)]


@pytest.mark.parametrize("change", ["training", "loading"])
def test_what_comes_later_does_not_change_a_state(change):
    parts, other = made(refresh_every=4), made(refresh_every=4)
    train(parts, range(2))
    train(other, range(5, 8))
    state = parts[2].state_dict()
    before = copy.deepcopy(tensors(state))
    if change == "training":
        train(parts, range(2, 6))
    else:
        parts[2].load_state_dict(other[2].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), before, strict=True))


def test_a_rollback_to_a_state_in_memory_is_exact():
    parts, twin = made(refresh_every=4), made(refresh_every=4)
    train(parts, range(2))
    train(twin, range(2))
    states = [copy.deepcopy(part.state_dict()) for part in parts[:2]] + [parts[2].state_dict()]
    train(parts, range(20, 25))
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    train(parts, range(2, 6))
    train(twin, range(2, 6))
    assert_same(parts, twin)


def test_a_checkpoint_whose_sigma_has_no_inverse_is_an_error_that_names_it(monkeypatch):
    parts, other = made(), made(gamma=0.5)
    train(parts, range(2))
    checkpoint = SimpleNamespace(path="out/step-2", train={"dopr": parts[2].state_dict()})
    monkeypatch.setattr(damped_root, "PROBE_TOLERANCE", -1.0)
    with pytest.raises(CheckpointError, match=r"out/step-2: 0: .*no inverse after"):
        _restore_preconditioner(other[2], checkpoint)


def test_after_detach_there_is_no_state_to_take_or_to_give():
    preconditioner = ActivationPreconditioner(mlp(), gamma=0.1)
    state = preconditioner.state_dict()
    preconditioner.detach()
    with pytest.raises(ValueError, match="was detached"):
        preconditioner.state_dict()
    with pytest.raises(ValueError, match="was detached"):
        preconditioner.load_state_dict(state)
