"""Test leaderboards, curves and sweeps on records whose answers are known."""

import math

import numpy as np
import pytest
from scipy import stats

from studies.stats.analysis import leaderboard, references, seed_curves, sweeps
from tests.studies.records import record

BASE, DOPR = [4.0, 5.0, 6.0], [3.0, 4.5, 4.0]


def runs(variant, values, first_seed=0, **changes):
    """Return a run for each value, on consecutive seeds."""
    return [record(variant, seed, v, **changes) for seed, v in enumerate(values, first_seed)]


STUDY = [*runs("adamw", BASE), *runs("dopr-adamw", DOPR)]


def test_the_leaderboard_compares_with_the_base_on_the_same_seeds():
    best, base = leaderboard(STUDY[::-1])  # the order of the records does not matter
    assert (best.variant, base.variant) == ("dopr-adamw", "adamw")
    expected = stats.ttest_rel(np.log(DOPR), np.log(BASE))  # ratios of errors
    interval = expected.confidence_interval(0.95)
    assert best.versus_base.difference.mean == pytest.approx(np.log(np.divide(DOPR, BASE)).mean())
    assert best.versus_base.difference.lo == pytest.approx(interval.low)
    assert best.versus_base.p == pytest.approx(expected.pvalue)
    assert best.versus_base.wins == 3
    assert base.versus_base is None


def test_a_variant_is_also_compared_with_its_base_at_its_own_rate():
    rows = [*runs("adamw", BASE), *runs("dopr-adamw", DOPR, lr=0.02)]
    others = runs("adamw", [9.0] * 3, role="control", lr=0.04)
    controls = runs("adamw", [2.0] * 3, role="control", lr=0.02)
    best, base = leaderboard([*rows, *others, *controls])
    assert best.at_this_rate.difference.mean == pytest.approx(np.log(np.divide(DOPR, 2)).mean())
    assert best.versus_base == leaderboard(rows)[0].versus_base  # without controls
    assert (base.primary.n, base.at_this_rate) == (3, None)
    assert leaderboard(rows)[0].at_this_rate is None
    same, _ = leaderboard(STUDY)
    assert same.at_this_rate == same.versus_base


def test_optimizers_that_lack_seeds_are_ranked_below_the_others():
    rows = [*runs("adamw", [5.0] * 2), *runs("muon", [4.0] * 2)]
    rows += [*runs("sgd", [0.1], first_seed=1), *runs("signum", [0.1, None])]
    found = [(row.variant, row.n_missing) for row in leaderboard(rows)]
    assert found == [("muon", 0), ("adamw", 0), ("sgd", 1), ("signum", 0)]
    single = leaderboard([record("adamw", 1, 2.0), record("muon", 2, 1.0)])
    assert [row.variant for row in single] == ["muon", "adamw"]


def test_errors_are_complements_if_higher_values_are_better():
    base, dopr = 0.1 * np.array(BASE), 0.1 * np.array(DOPR)
    rows = runs("adamw", base, higher_is_better=True)
    best, worst = leaderboard([*rows, *runs("dopr-adamw", dopr, higher_is_better=True)])
    assert (best.variant, worst.versus_base.wins) == ("adamw", 0)
    expected = np.log((1 - dopr) / (1 - base)).mean()
    assert worst.versus_base.difference.mean == pytest.approx(expected)


def test_references_are_averaged_once_per_seed_and_are_not_on_the_leaderboard():
    rows = runs("oracle", [2.0, 4.0], role="reference")
    loss, metric = references([*rows, *rows])["oracle"]  # of two folders
    assert (loss.mean, metric.mean, metric.n) == (1.0, 3.0, 2)
    assert [row.variant for row in leaderboard([*STUDY, *rows])] == ["dopr-adamw", "adamw"]


def test_an_outlying_seed_does_not_decide_the_order():
    first, second = leaderboard([*runs("adamw", [4.0] * 3), *runs("muon", [1.0, 1.0, 20.0])])
    assert (first.variant, second.variant) == ("muon", "adamw")  # 20^(1/3) = 2.7 < 4 < 22 / 3
    assert (first.median, first.primary.mean) == (1.0, pytest.approx(22 / 3))


def test_tuning_runs_do_not_enter_the_leaderboard():
    rows = [*STUDY, record("dopr-adamw", 9, 0.001, role="tuning")]
    assert leaderboard(rows)[0].primary.mean == pytest.approx(np.mean(DOPR))


def test_a_diverged_run_loses_its_pair_and_puts_its_optimizer_last():
    last = leaderboard([*STUDY, record("dopr-adamw", 3, None), record("adamw", 3, 9.0)])[-1]
    assert (last.variant, last.n_diverged) == ("dopr-adamw", 1)
    assert (last.versus_base.wins, last.versus_base.n_pairs) == (3, 4)
    assert last.versus_base.difference.n == 3  # the pairs that finished


def test_a_pair_is_won_against_a_diverged_base_and_not_if_both_diverged():
    rows = [*runs("dopr-adamw", [1.0, None], 3), *runs("adamw", [None, None], 3)]
    versus = {row.variant: row.versus_base for row in leaderboard([*STUDY, *rows])}["dopr-adamw"]
    assert (versus.wins, versus.n_pairs) == (4, 5)


def test_an_optimizer_that_always_diverged_has_no_numbers():
    last = leaderboard([*STUDY, *runs("fast-dopr-adamw", [None] * 3)])[-1]
    assert (last.variant, last.versus_base.wins) == ("fast-dopr-adamw", 0)
    assert math.isnan(last.primary.mean)
    assert last.versus_base.difference.n == 0


def test_curves_have_intervals_over_seeds_and_a_single_run_keeps_its_own():
    mean, lo, hi = seed_curves(STUDY, "B")["adamw"]
    half = stats.t.ppf(0.975, 2) * np.std(BASE, ddof=1) / np.sqrt(3)
    assert mean == pytest.approx([1.0, 5.0])
    assert (lo[1], hi[1]) == pytest.approx((5.0 - half, 5.0 + half))
    single = seed_curves([record("adamw", 0, 4.0, role="single")], "B")["adamw"]
    assert [each.tolist() for each in single] == [[1.0, 4.0], [0.0, 0.0], [2.0, 9.0]]


def test_a_sweep_is_sorted_by_rate_and_averages_tuning_seeds():
    rows = runs("adamw", [2.0, 2.0], role="tuning", lr=0.2, val_loss=3.0)
    rows += [record("adamw", 0, 1.0, role="tuning", lr=0.1), record("adamw", 1, 5.0, lr=0.1)]
    assert sweeps(rows) == {"adamw": [(0.1, 1.0, 1.0), (0.2, 3.0, 2.0)]}
