"""Resuming is exact; a state of other settings is made to fit, one of other layers is refused."""

import pytest
import torch

from kernels import cholesky
from optim import ActivationPreconditioner
from tests.optim.models import backward, covariance, mlp, oracle, recorded, relative_error
from tests.optim.runs import BASES, LAZY, assert_same, made, resumed, train


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
        ValueError, match=r"unexpected 9; 2: sigma is \(1, 3, 3\), wanted \(1, 9, 9\)"
    ):
        preconditioner.load_state_dict(state)
    del state["0"], state["9"], state["2"]["P"]
    with pytest.raises(ValueError, match="missing 0; 2 has no P"):
        preconditioner.load_state_dict(state)
    assert_same(parts, before)


BAD_STATES = {
    "P": (torch.zeros(1, 9, 3), r"2: P is \(1, 9, 3\), wanted \(1, 9, 9\)"),
    "damping": (torch.zeros(3), r"2: damping is \(3,\), wanted \(1,\)"),
    "norm_ratio": (torch.zeros(2), r"2: norm_ratio is \(2,\), wanted \(\)"),
    "gram": (torch.zeros(9, 9), r"2: gram is \(9, 9\), wanted \(1, 9, 9\)"),
    "count": (torch.zeros(1), r"2: count is \(1,\), wanted \(\)"),
    "sigma": ([1.0], r"2: sigma is None, wanted \(1, 9, 9\)"),
    "step": ("7", r"2: step is '7'"),
}


@pytest.mark.parametrize("key", BAD_STATES)
def test_every_tensor_and_number_of_a_state_is_checked(key):
    parts = made()
    train(parts, range(2))
    before, state = resumed(parts), parts[2].state_dict()
    value, message = BAD_STATES[key]
    state["2"] = state["2"] | {key: value}
    with pytest.raises(ValueError, match=message):
        parts[2].load_state_dict(state)
    assert_same(parts, before)


def test_all_that_is_wrong_with_a_state_of_other_blocks_is_listed():
    parts, blocked = made(), made(block_diagonal=4)
    train(parts, range(2))
    with pytest.raises(ValueError, match="does not fit") as error:
        blocked[2].load_state_dict(parts[2].state_dict())
    for problem in ("0: sigma is (1, 12, 12), wanted (3, 4, 4)", "0: P is", "2: damping is (1,)"):
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
    wanted = oracle(G, covariance(inputs[0]), p=p, **{"gamma": 0.1} | other)
    assert relative_error(again[0][0].weight.grad, wanted) < 1e-5  # fp32 rounding, κ < 100
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
    monkeypatch.setattr(cholesky, "PROBE_TOLERANCE", -1.0)  # no inverse would pass
    assert_same(resumed(parts, **LAZY), parts)


def test_a_stored_sigma_without_an_inverse_is_an_error_that_changes_nothing(monkeypatch):
    parts, other = made(), made(gamma=0.5)
    train(parts, range(3))
    train(other, range(2))
    before = resumed(other, gamma=0.5)
    monkeypatch.setattr(cholesky, "PROBE_TOLERANCE", -1.0)
    with pytest.raises(FloatingPointError, match="no inverse after"):
        other[2].load_state_dict(parts[2].state_dict())
    assert_same(other, before)


def test_a_more_frequent_refresh_holds_from_the_first_step_after_resuming():
    parts = made(refresh_every=100)
    train(parts, range(3))
    parts = resumed(parts, refresh_every=2)
    train(parts, range(3, 5))  # step 4 is due
    assert [layer.n_refreshes for layer in parts[2].layers] == [2, 2]


def test_after_detach_there_is_no_state_to_take_or_to_give():
    preconditioner = ActivationPreconditioner(mlp(), gamma=0.1)
    state = preconditioner.state_dict()
    preconditioner.detach()
    with pytest.raises(ValueError, match="was detached"):
        preconditioner.state_dict()
    with pytest.raises(ValueError, match="was detached"):
        preconditioner.load_state_dict(state)
