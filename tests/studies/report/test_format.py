"""Test how names and numbers are formatted."""

import math

import pytest

from eval.rollout.intervals import Estimate
from studies.report.format import (
    error_unit,
    factor,
    metric_label,
    mode_of,
    p_value,
    pair,
    times,
    verdict,
)
from studies.stats.analysis import Compared
from studies.stats.seeds import paired


@pytest.mark.parametrize(
    ("mean", "half", "shown"),
    [
        (1.23456, 0.0321, ("1.235", "± 0.032")),
        (-0.5, 0.25, ("−0.50", "± 0.25")),
        (12345.6, 210.0, ("12,346", "± 210")),
        (3.14159, math.nan, ("3.142", "")),  # a single seed
        (0.0, 0.0, ("0", "")),  # exact
        (2.5e8, math.nan, ("2.500e8", "")),
        (2.05e-5, 3.2e-6, ("2.05e−5", "± 0.32e−5")),
        (math.nan, math.nan, ("–", "")),
    ],
)
def test_a_mean_has_as_many_digits_as_its_interval_supports(mean, half, shown):
    assert pair(Estimate(mean, mean - half, mean + half, 3)) == shown


def test_a_factor_has_three_digits_near_one_and_two_far_from_it():
    values = (0.8321, 144.0, 2.06e-7, 9.964, 3e12, 1.0)
    shown = ["0.832", "144", "2.1e−7", "9.96", "3.0e12", "1.00"]
    assert [factor(math.log(value)) for value in values] == shown
    assert (factor(math.nan), factor(-2000.0)) == ("–", "0.00")


@pytest.mark.parametrize(
    ("ends", "shown"),
    [
        ((-0.0011, -0.0007, -0.0003), ("× 0.9993", "[0.999, 0.9997]")),
        ((0.0011, 0.0042, 0.02), ("× 1.004", "[1.001, 1.02]")),
        ((0.0004, 0.08, 3.0), ("× 1.08", "[1.0004, 20.1]")),
        ((-0.0011, 0.0, 0.0011), ("× 1.00", "[0.999, 1.00]")),
        ((-0.3, -0.2, -0.1), ("× 0.819", "[0.741, 0.905]")),
    ],
)
def test_an_interval_that_excludes_one_has_enough_digits_to_show_it(ends, shown):
    lo, mean, hi = ends
    assert times(Estimate(mean, lo, hi, 8)) == shown


def test_small_p_values_are_not_rounded_to_zero():
    values = (1.23e-9, 6.8e-4, 7.4e-4, 0.0123, 0.5, 1.0)
    shown = ["1.2e−9", "0.00068", "0.00074", "0.012", "0.50", "1.00"]
    assert [p_value(p) for p in values] == shown


LOW, HIGH, MIXED = [3.0, 3.1, 3.2], [5.0, 5.2, 5.1], [2.0, 5.0, 3.0]


def compared(ours, theirs, lost=0, base_lost=0):
    return Compared(**vars(paired(ours, theirs)), n_lost=lost, n_base_lost=base_lost)


BETTER, WORSE, UNCLEAR = compared(LOW, HIGH), compared(HIGH, LOW), compared(LOW, MIXED)


def test_a_clear_verdict_needs_an_interval_that_excludes_zero():
    assert [verdict(each) for each in (BETTER, WORSE, UNCLEAR)] == ["better", "worse", "unclear"]
    assert verdict(compared([1.0], [2.0])) == "one seed"


@pytest.mark.parametrize(
    ("tuned", "at_equal_rates", "expected"),
    [
        (BETTER, BETTER, "better"),
        (BETTER, UNCLEAR, "by its rate"),
        (BETTER, WORSE, "by its rate"),
        (WORSE, UNCLEAR, "by its rate"),
        (UNCLEAR, BETTER, "unclear"),
        (BETTER, compared([3.0], [3.0]), "better"),  # too few pairs at equal rates
    ],
)
def test_a_gain_that_vanishes_at_equal_rates_is_attributed_to_the_rate(
    tuned, at_equal_rates, expected
):
    assert verdict(tuned, at_equal_rates) == expected


@pytest.mark.parametrize(
    ("lost", "base_lost", "expected"),
    [(0, 0, "better"), (5, 4, "diverged"), (5, 5, "better"), (1, 5, "better")],
)
def test_a_variant_that_diverged_more_often_than_its_base_is_not_better(lost, base_lost, expected):
    assert verdict(compared(LOW, HIGH, lost, base_lost)) == expected


def test_a_mode_is_what_a_variant_adds_to_its_base():
    assert mode_of("fast-dopr-adamw+gamma=0.01", "adamw") == "fast DoPr, gamma=0.01"
    assert mode_of("muon", "muon") == "base"


def test_a_metric_has_the_unit_of_the_errors_of_its_task():
    assert metric_label("gap", error_unit({"val_ce", "gap"})).endswith("(nats per step)")
    assert "squared action error" in metric_label("gap", error_unit({"val_loss", "gap"}))
    assert metric_label("success") == "success"
