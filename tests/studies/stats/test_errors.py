"""Test the rollout error that follows from each metric that ranks."""

import math

import numpy as np
import pytest

from studies.stats.errors import error_of, log_error
from tests.studies.records import record

HALF = 0.5 / 9  # half an episode, of 8 episodes


def ranked(name, value, *, higher, **others):
    """Return a run that the metric `name` ranks, with other metrics."""
    row = record("adamw", 0, value, primary=name, higher_is_better=higher)
    row["grade"]["metrics"] = {
        key: {"mean": mean, "n": 8} for key, mean in ({name: value} | others).items()
    }
    return row


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (ranked("jeffreys", 0.25, higher=False), 0.25),
        (ranked("failure", 0.0, higher=False), HALF),
        (ranked("success", 0.75, higher=True), 0.25),
        (ranked("success", 1.0, higher=True), HALF),
        (ranked("log10_deviation", 3.0, higher=False), 1000.0),
        (ranked("return", 1500.0, higher=True, shortfall=0.25), 0.25),
        (ranked("return", -100.0, higher=True, shortfall=1.5), 1.5),
        (ranked("return", 2000.0, higher=True, shortfall=-0.01), HALF),
    ],
    ids=lambda given: given["primary"] if isinstance(given, dict) else f"{given:.3g}",
)
def test_the_log_error_follows_from_the_metric_and_no_error_is_half_an_episode(row, error):
    assert log_error(row) == pytest.approx(math.log(error))


@pytest.mark.parametrize(
    "row",
    [
        ranked("jeffreys", 0.25, higher=False),
        ranked("success", 0.75, higher=True),
        ranked("log10_deviation", 3.0, higher=False),
        ranked("return", 1500.0, higher=True, shortfall=0.25),
    ],
    ids=lambda row: row["primary"],
)
def test_an_error_converts_back_to_its_metric(row):
    error = error_of(row)
    value = row["grade"]["metrics"][row["primary"]]["mean"]
    assert error.to_metric(np.array([error.of(row)]), row) == pytest.approx(value)


def test_shares_and_returns_have_odds():
    has_odds = {
        name: error_of(ranked(name, 0.5, higher=True)).is_share
        for name in ("success", "survival", "return", "exact_match")
    }
    assert has_odds == {"success": True, "survival": True, "return": True, "exact_match": False}
    assert error_of(ranked("failure", 0.5, higher=False)).is_share


@pytest.mark.parametrize("name", ["jeffreys", "success", "log10_deviation", "return"])
def test_a_run_that_diverged_has_no_error(name):
    lost = record("adamw", 0, None, primary=name, higher_is_better=name in ("success", "return"))
    assert math.isnan(log_error(lost))
