"""Test that the number of steps to a loss is interpolated between whole runs."""

import math

import pytest

from studies.fresh_mean.steps import row_of, steps_to, table_of


@pytest.mark.parametrize(
    ("target", "expected"),
    [(4.0, 200), (4.5, 100 * 2**0.5), (6.0, 100), (3.0, 400), (2.0, math.inf)],
)
def test_the_number_of_steps_to_a_loss_is_interpolated(target, expected):
    assert steps_to(target, {100: 5.0, 200: 4.0, 400: 3.0}) == pytest.approx(expected)


def test_the_ratio_is_a_geometric_mean_over_seeds():
    losses = {100: 3 * [5.0], 200: 3 * [4.0], 400: 3 * [3.0]}
    row = row_of("adamw", [5.0, 4.0, 3.0], losses)
    assert row["steps"] == [100, 200, 400]
    assert row["ratio"] == pytest.approx(0.5)
    assert row["interval"][0] < row["ratio"] < row["interval"][1]
    assert "100, 200, 400" in table_of([row])


def test_a_loss_that_is_not_reached_has_no_ratio():
    row = row_of("muon", [1.0], {100: [5.0], 400: [3.0]})
    assert "not reached" in table_of([row])
