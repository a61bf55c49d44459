"""Test the grades of policies whose errors are known."""

import math

import numpy as np
import pytest

from studies.humanoid.cloning import spread
from studies.humanoid.demonstrations import demonstrations_of, expert_policy
from studies.humanoid.grading import STRIDE, grade_policy
from tests.studies.humanoid.small import SMALL

ERRORS = [f"action_error_steps_{window}" for window in ("0-20", "20-40", "40-60")]


def test_the_expert_has_no_error_and_its_own_return():
    grade = SMALL.grade_reference("expert", n=1, seed=0)
    means = grade.means()
    assert means["val_loss"] == pytest.approx(0, abs=1e-9)
    assert [means[name] for name in ERRORS] == pytest.approx([0] * 3, abs=1e-9)
    assert (means["falls"], means["length"]) == (0, 1000)
    assert abs(means["shortfall"]) < 0.05
    assert grade.curves["survival"].mean == [1] * (1000 // STRIDE)


def test_a_constant_error_of_the_action_is_found_in_every_step():
    data, expert = demonstrations_of(SMALL), expert_policy(SMALL.expert)
    error = 0.2 * spread(data.actions)
    grade = grade_policy(SMALL, lambda states: expert(states) + error, 2, 0)
    means = grade.means()
    assert [means[name] for name in ("val_loss", *ERRORS)] == pytest.approx([0.04] * 4, rel=1e-4)
    known = [value for value in grade.curves["action_error"].mean if not math.isnan(value)]
    assert known == pytest.approx([0.04] * len(known), rel=1e-4)


def test_a_policy_that_never_acts_falls_and_has_no_error_after_its_end():
    grade = SMALL.grade_reference("zero", n=3, seed=0)
    means = grade.means()
    assert means["falls"] == 1
    assert means["shortfall"] == pytest.approx(
        1 - means["return"] / demonstrations_of(SMALL).expert_return
    )
    survival = np.array(grade.curves["survival"].mean)
    assert np.all(np.diff(survival) <= 0)
    # The sum over steps of the share that goes on is the mean length, up to the stride.
    assert abs(STRIDE * survival.sum() - means["length"]) <= STRIDE
    last = math.ceil(means["length"] * 3 / STRIDE)
    assert all(map(math.isnan, grade.curves["action_error"].mean[last:]))


def test_another_seed_grades_other_episodes():
    grades = [SMALL.grade_reference("zero", n=2, seed=seed) for seed in (0, 0, 1)]
    returns = [grade.means()["return"] for grade in grades]
    assert returns[0] == returns[1] != returns[2]
