"""Learning-rate schedules: boundary values and general properties."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optim.schedule import SCHEDULES, lr_scale

RUN = {"warmup_steps": 10, "max_steps": 100, "min_lr_ratio": 0.1}


def curve(schedule: str, **changes) -> list[float]:
    settings = RUN | changes
    steps = range(settings["max_steps"] + 1)
    return [lr_scale(step, schedule=schedule, **settings) for step in steps]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_starts_above_zero_and_reaches_one_at_its_end(schedule):
    scale = curve(schedule)
    assert scale[0] == 1 / 11
    assert scale[9] == 10 / 11
    assert scale[10] == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_the_first_step_has_the_full_rate(schedule):
    assert curve(schedule, warmup_steps=0)[0] == 1


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_step_after_the_last_would_have_the_smallest_rate(schedule):
    scale = curve(schedule)
    assert scale[100] == pytest.approx(0.1, abs=1e-15)  # rounding of 1 + cos(pi)
    assert 0.1 < scale[99] < 0.15


def test_cosine_is_half_way_down_in_the_middle():
    assert curve("cosine")[55] == pytest.approx(0.55, abs=1e-15)


def test_wsd_is_flat_and_then_a_straight_line_over_the_last_fifth():
    scale = curve("wsd")
    assert set(scale[10:81]) == {1.0}
    assert scale[81:] == pytest.approx([1 - 0.9 * i / 20 for i in range(1, 21)])


def test_wsd_never_decays_during_warm_up():
    scale = curve("wsd", warmup_steps=95)
    assert scale[95] == 1
    assert scale == sorted(scale[:96]) + sorted(scale[96:], reverse=True)


def test_constant_stays_at_one_after_warm_up_beyond_the_last_step():
    assert lr_scale(1000, schedule="constant", **RUN) == 1


@given(
    schedule=st.sampled_from(SCHEDULES),
    warmup_steps=st.integers(0, 50),
    after=st.integers(1, 200),
    min_lr_ratio=st.floats(0, 1),
)
def test_scale_is_positive_and_never_jumps(schedule, warmup_steps, after, min_lr_ratio):
    max_steps = warmup_steps + after
    settings = {"warmup_steps": warmup_steps, "max_steps": max_steps, "min_lr_ratio": min_lr_ratio}
    scale = curve(schedule, **settings)
    assert all(0 < s <= 1 for s in scale[:-1])
    steepest = {
        "constant": 0,
        "cosine": math.pi / 2 / after,
        "wsd": 1 / min(after, 0.2 * max_steps),
    }[schedule]
    jumps = [abs(b - a) for a, b in itertools.pairwise(scale)]
    assert max(jumps) <= max(1 / (warmup_steps + 1), steepest) + 1e-12


@given(step=st.integers(0, 10**9), schedule=st.sampled_from(SCHEDULES))
def test_every_step_has_a_scale(step, schedule):
    assert 0.1 <= lr_scale(step, schedule=schedule, warmup_steps=0, max_steps=7, min_lr_ratio=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "cosin"}, r"schedule='cosin'.*did you mean 'cosine'"),
        ({"step": -1}, "step=-1: must be at least 0"),
        ({"warmup_steps": -3}, "warmup_steps=-3"),
        ({"warmup_steps": 100}, "warmup_steps=100: must be below max_steps=100"),
        ({"min_lr_ratio": 1.5}, r"min_lr_ratio=1.5: must be in \[0, 1\]"),
        ({"min_lr_ratio": float("nan")}, "min_lr_ratio=nan"),
    ],
)
def test_bad_input_is_named_with_its_value(changes, message):
    with pytest.raises(ValueError, match=message):
        lr_scale(**({"step": 0, "schedule": "cosine"} | RUN | changes))
