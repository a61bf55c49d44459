"""Compare intervals and tests with scipy's, and measure their coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from eval.rollout.intervals import LEVEL, bootstrap_weights, percentiles
from studies.stats.seeds import over_seeds, paired

EXACT = 1e-12  # float64, the same formula
VALUES = [0.31, 0.27, 0.44, 0.29, 0.35]
OTHERS = [0.33, 0.25, 0.48, 0.36, 0.41]


def interval_of_the_mean(sample: np.ndarray) -> tuple[float, float, float]:
    weights = bootstrap_weights(len(sample))
    mean, lo, hi = percentiles(weights @ sample / weights.sum(1))
    return float(mean), float(lo), float(hi)


def test_every_resample_has_as_many_units_and_the_first_row_is_the_sample():
    weights = bootstrap_weights(7)
    assert (weights[0] == 1).all()
    assert (weights.sum(1) == 7).all()
    assert len(np.unique(weights, axis=0)) > 100


def test_the_interval_of_a_mean_is_scipys():
    sample = np.random.default_rng(0).exponential(size=200)
    mean, *ends = interval_of_the_mean(sample)
    theirs = stats.bootstrap(
        (sample,), np.mean, method="percentile", n_resamples=20_000, rng=1
    ).confidence_interval
    width = theirs.high - theirs.low
    assert mean == pytest.approx(sample.mean(), rel=EXACT)
    assert ends == pytest.approx([theirs.low, theirs.high], abs=0.05 * width)  # 1000 resamples


def test_the_interval_covers_the_truth_as_often_as_it_says():
    n = 50
    samples = np.random.default_rng(0).normal(size=(n, 4000))
    _, lo, hi = percentiles(bootstrap_weights(n) @ samples / n)
    covered = ((lo <= 0) & (hi >= 0)).mean()
    narrow = stats.norm.isf((1 - LEVEL) / 2) * np.sqrt(
        (n - 1) / n
    )  # the sd of the resamples has the same factor
    assert covered == pytest.approx(1 - 2 * stats.t.sf(narrow, n - 1), abs=0.015)  # 4 sd


def test_percentiles_are_taken_column_by_column_and_skip_nan():
    values = np.stack([np.arange(1001.0), np.full(1001, math.nan)], axis=1)
    values[500:, 0] = math.nan
    first, lo, hi = percentiles(values)
    ends = np.percentile(range(1, 500), [2.5, 97.5])
    assert (first[0], lo[0], hi[0]) == pytest.approx((0, *ends), rel=EXACT)
    assert np.isnan([first[1], lo[1], hi[1]]).all()


def test_the_mean_over_seeds_has_students_interval():
    ours = over_seeds(VALUES)
    theirs = stats.t.interval(LEVEL, len(VALUES) - 1, np.mean(VALUES), stats.sem(VALUES))
    assert ours.mean == pytest.approx(np.mean(VALUES), rel=EXACT)
    assert (ours.lo, ours.hi, ours.n) == pytest.approx((*theirs, 5), rel=EXACT)


@pytest.mark.parametrize("values", [[0.5], [0.25, 0.75]])
def test_one_or_two_seeds_have_no_interval_and_no_p(values):
    ours = over_seeds(values)
    assert (ours.mean, ours.n) == (0.5, len(values))
    assert paired(values, [1.0, 2.0][: len(values)]).p == 1
    assert math.isnan(ours.lo)
    assert math.isnan(ours.hi)


def test_the_paired_test_is_scipys():
    ours, theirs = paired(VALUES, OTHERS), stats.ttest_rel(VALUES, OTHERS)
    ends = theirs.confidence_interval(LEVEL)
    assert ours.p == pytest.approx(theirs.pvalue, rel=EXACT)
    found = ours.difference
    assert (found.lo, found.hi) == pytest.approx((ends.low, ends.high), rel=EXACT)
    assert found.mean == pytest.approx(np.mean(VALUES) - np.mean(OTHERS), rel=EXACT)


def test_wins_are_counted_in_the_metrics_direction():
    assert paired(VALUES, OTHERS).wins == 4
    assert paired(OTHERS, VALUES).wins == 1
    assert paired(VALUES, VALUES).wins == 0


@pytest.mark.parametrize("values", [VALUES[:1], VALUES])
def test_without_a_spread_nothing_is_significant(values):
    assert paired(values, values).p == 1


def test_unequal_numbers_of_seeds_are_refused():
    with pytest.raises(ValueError, match="5 and 4 values"):
        paired(VALUES, OTHERS[:4])
