"""Equal validation: pairs whose answer is known."""

import math

import numpy as np
import pytest

from studies.stats.matched import fit_curve, matched_validation, placebo
from studies.stats.seeds import over_seeds
from tests.studies.records import record

SLOPE, HARDER = 2.0, (0.0, 0.7, 1.1)  # of log error in log loss; what an instance adds to both


def on_a_line(shift: float):
    """Bases on a line within each seed, instances apart; DoPr `shift` off its seed's line."""
    rows = []
    for seed, harder in enumerate(HARDER):
        for variant, x, off in (
            ("adamw", 0.8, 0.0),
            ("muon", 0.1, 0.0),
            ("dopr-adamw", 0.4, shift),
        ):
            error = math.exp(SLOPE * x + 3 * harder + off)
            rows.append(record(variant, seed, error, val_loss=math.exp(x + harder)))
    return rows


@pytest.mark.parametrize("shift", [-0.3, 0.0, 0.2])
def test_matched_validation_finds_what_the_loss_does_not_explain(shift):
    matched = matched_validation(on_a_line(shift))
    assert matched.keys() == {"dopr-adamw"}  # a base is what others are compared with
    residual = matched["dopr-adamw"].residual
    assert (residual.mean, residual.lo, residual.hi) == pytest.approx((shift,) * 3, abs=1e-9)


def test_a_run_outside_the_range_of_the_bases_is_not_compared():
    rows = on_a_line(0.0)
    better = [r | {"val_loss": 0.1} if r["variant"] == "dopr-adamw" else r for r in rows]
    matched = matched_validation(better)["dopr-adamw"]
    assert (matched.n_inside, matched.n) == (0, 3)
    assert math.isnan(matched.residual.mean)


def test_the_line_has_the_slope_within_seeds():
    x, y = fit_curve(on_a_line(0.0))
    assert np.diff(np.log(y)) / np.diff(np.log(x)) == pytest.approx(SLOPE)


def test_three_bases_show_a_bend_and_what_lies_on_it_is_explained():
    places = {"adamw": 0.8, "muon": 0.1, "sgd": 1.3, "dopr-adamw": 0.3}
    rows = [
        record(name, seed, math.exp(2 * x - 0.6 * x**2 + 3 * harder), val_loss=math.exp(x))
        for seed, harder in enumerate(HARDER)
        for name, x in places.items()
    ]
    residual = matched_validation(rows)["dopr-adamw"].residual
    assert (residual.mean, residual.hi) == pytest.approx((0.0, 0.0), abs=1e-9)
    x, y = np.log(fit_curve(rows))
    assert np.polyfit(x, y, 2)[:2] == pytest.approx([-0.6, 2.0])


def test_no_failure_in_n_episodes_counts_as_half_of_one():
    rows = on_a_line(0.0)
    zero = [
        record("dopr-adamw", 0, 0.0, val_loss=1.5),
        *(r for r in rows if r["base"] == r["variant"]),
    ]
    assert matched_validation(zero)["dopr-adamw"].n_inside == 1


def shares(shift: float, metric: str = "success", higher: bool = True):
    """The same line in the log-odds of an error that is a share, from .01 to .998."""
    rows = []
    for each in on_a_line(shift):
        odds = each["grade"]["metrics"]["accumulated_kl"]["mean"] / 60
        error = odds / (1 + odds)
        value = {"mean": 1 - error if higher else error, "n": 8}
        rows.append(each | {"primary": metric, "higher_is_better": higher})
        rows[-1]["grade"] = {"metrics": {metric: value}}
    return rows


@pytest.mark.parametrize(("metric", "higher"), [("success", True), ("failure", False)])
def test_a_share_is_compared_by_its_odds_and_the_curve_stays_between_0_and_1(metric, higher):
    residual = matched_validation(shares(-0.3, metric, higher))["dopr-adamw"].residual
    assert (residual.mean, residual.hi) == pytest.approx((-0.3, -0.3), abs=1e-9)
    x, error = fit_curve(shares(0.0, metric, higher))
    assert np.diff(np.log(error / (1 - error))) / np.diff(np.log(x)) == pytest.approx(SLOPE)
    assert error.max() < 1


def test_no_success_in_n_episodes_counts_as_half_of_one():
    rows = shares(0.0)
    rows[2]["grade"]["metrics"]["success"]["mean"] = 0.0  # dopr-adamw of the first seed
    assert matched_validation(rows)["dopr-adamw"].n_inside == 3


def test_one_base_run_a_seed_gives_no_slope():
    rows = [record("adamw", seed, 4.0 + seed) for seed in range(3)]
    rows += [record("dopr-adamw", seed, 3.0 + seed) for seed in range(3)]
    assert matched_validation(rows) == {}
    assert len(fit_curve(rows)[0]) == 0


def noisy(draw: int, n_seeds: int = 8, effect: float = 0.0):
    """Five bases and DoPr around one parabola, with noise of their own; instances apart."""
    random = np.random.default_rng(draw)
    places = {"adamw": 0.8, "muon": 0.1, "sgd": 1.3, "signum": 1.0, "adamuon": 0.4}
    rows = []
    for seed in range(n_seeds):
        harder = random.normal()
        for name, place in (places | {"dopr-adamw": 0.3}).items():
            x = place + 0.1 * random.normal()
            y = 2 * x - 0.6 * x**2 + 3 * harder + 0.1 * random.normal()
            y += effect * (name == "dopr-adamw")
            rows.append(record(name, seed, math.exp(y), val_loss=math.exp(x)))
    return rows


def test_without_an_effect_the_interval_covers_one_as_often_as_it_says():
    found = [matched_validation(noisy(draw))["dopr-adamw"].residual for draw in range(60)]
    covered = np.mean([each.lo <= 0 <= each.hi for each in found])
    assert 0.86 <= covered <= 1  # 0.95 less three standard deviations of 60 draws


def test_an_effect_is_found_and_no_pair_of_bases_has_one_as_large():
    rows = noisy(0, effect=-0.5)
    residual = matched_validation(rows)["dopr-adamw"].residual
    assert residual.lo < -0.5 < residual.hi < 0
    pairs = placebo(rows)
    assert len(pairs) == 10  # of five bases
    assert pairs["adamw / muon"].n == 8
    assert max(abs(each.mean) for each in pairs.values()) < 0.2


def test_where_f_is_exact_the_interval_is_students():
    offs = [0.3, -0.1, 0.2]
    rows = [each for off in offs for each in on_a_line(off) if each["seed"] == offs.index(off)]
    found, student = matched_validation(rows)["dopr-adamw"].residual, over_seeds(offs)
    assert found.mean == pytest.approx(student.mean)
    assert found.hi - found.lo == pytest.approx(student.hi - student.lo, rel=0.1)  # 1000 resamples


def test_bases_that_the_curve_goes_through_are_no_placebo():
    assert placebo(on_a_line(0.0)) == {}
