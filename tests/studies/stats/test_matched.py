"""Test the comparison at equal validation, on records whose answers are known."""

import math

import numpy as np
import pytest

from studies.stats.matched import fit_curve, matched_validation, placebo
from studies.stats.seeds import over_seeds
from tests.studies.records import record

SLOPE = 2.0  # of the log error in the log loss
HARDER = (0.0, 0.7, 1.1)  # what the instance of a seed adds to the log loss
PLACES = {"adamw": 0.8, "muon": 0.1, "dopr-adamw": 0.4}  # log losses of the variants


def on_a_line(shift: float):
    """Return bases on one line for each seed, and DoPr at a distance of `shift` from it."""
    rows = []
    for seed, harder in enumerate(HARDER):
        for variant, x in PLACES.items():
            y = SLOPE * x + 3 * harder + shift * (variant == "dopr-adamw")
            rows.append(record(variant, seed, math.exp(y), val_loss=math.exp(x + harder)))
    return rows


def dopr_of(rows):
    return matched_validation(rows)["dopr-adamw"]


@pytest.mark.parametrize("shift", [-0.3, 0.0, 0.2])
def test_the_difference_is_the_part_that_the_loss_does_not_explain(shift):
    assert matched_validation(on_a_line(shift)).keys() == {"dopr-adamw"}  # without bases
    residual = dopr_of(on_a_line(shift)).residual
    assert (residual.mean, residual.lo, residual.hi) == pytest.approx((shift,) * 3, abs=1e-9)


def test_a_run_outside_the_range_of_the_bases_is_not_compared():
    rows = on_a_line(0.0)
    better = [r | {"val_loss": 0.1} if r["variant"] == "dopr-adamw" else r for r in rows]
    assert (dopr_of(better).n_inside, dopr_of(better).n) == (0, 3)
    assert math.isnan(dopr_of(better).residual.mean)


def test_the_line_has_the_slope_within_seeds():
    x, y = fit_curve(on_a_line(0.0))
    assert np.diff(np.log(y)) / np.diff(np.log(x)) == pytest.approx(SLOPE)


def test_three_bases_determine_a_parabola():
    places = {"adamw": 0.8, "muon": 0.1, "sgd": 1.3, "dopr-adamw": 0.3}
    rows = [
        record(name, seed, math.exp(2 * x - 0.6 * x**2 + 3 * harder), val_loss=math.exp(x))
        for seed, harder in enumerate(HARDER)
        for name, x in places.items()
    ]
    residual = dopr_of(rows).residual
    assert (residual.mean, residual.hi) == pytest.approx((0.0, 0.0), abs=1e-9)
    x, y = np.log(fit_curve(rows))
    assert np.polyfit(x, y, 2)[:2] == pytest.approx([-0.6, 2.0])


def shares(shift: float, metric: str = "success", higher: bool = True):
    """Return the records of `on_a_line` with the error as a share, from 0.01 to 0.998."""
    rows = []
    for each in on_a_line(shift):
        odds = each["grade"]["metrics"]["accumulated_kl"]["mean"] / 60
        error = odds / (1 + odds)
        value = {"mean": 1 - error if higher else error, "n": 8}
        grade = {"metrics": {metric: value}}
        rows.append(each | {"primary": metric, "higher_is_better": higher, "grade": grade})
    return rows


@pytest.mark.parametrize(("metric", "higher"), [("success", True), ("failure", False)])
def test_a_share_is_compared_by_its_odds_and_its_curve_stays_below_one(metric, higher):
    residual = dopr_of(shares(-0.3, metric, higher)).residual
    assert (residual.mean, residual.hi) == pytest.approx((-0.3, -0.3), abs=1e-9)
    x, error = fit_curve(shares(0.0, metric, higher))
    assert np.diff(np.log(error / (1 - error))) / np.diff(np.log(x)) == pytest.approx(SLOPE)
    assert error.max() < 1


@pytest.mark.parametrize("rows", [on_a_line(0.0), shares(0.0)], ids=["no error", "no success"])
def test_a_run_without_errors_or_without_successes_is_compared(rows):
    rows[2]["grade"]["metrics"][rows[2]["primary"]]["mean"] = 0.0  # dopr-adamw on the first seed
    assert dopr_of(rows).n_inside == 3


def test_one_base_gives_no_fit():
    rows = [each for each in on_a_line(0.0) if each["base"] == "adamw"]
    assert matched_validation(rows) == {}
    assert len(fit_curve(rows)[0]) == 0


def noisy(draw: int, n_seeds: int = 8, effect: float = 0.0):
    """Return five bases and DoPr on one parabola with noise, on instances of other difficulty."""
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


def test_without_an_effect_95_percent_of_the_intervals_contain_zero():
    found = [dopr_of(noisy(draw)).residual for draw in range(60)]
    covered = np.mean([each.lo <= 0 <= each.hi for each in found])
    assert 0.86 <= covered <= 1  # 0.95 less three standard deviations of 60 draws


def test_an_effect_is_found_and_is_larger_than_the_difference_of_any_two_bases():
    rows = noisy(0, effect=-0.5)
    residual = dopr_of(rows).residual
    assert residual.lo < -0.5 < residual.hi < 0
    pairs = placebo(rows)
    assert len(pairs) == 10  # of five bases
    assert pairs["adamw / muon"].n == 8
    assert max(abs(each.mean) for each in pairs.values()) < 0.2


def test_the_interval_is_students_if_the_fit_is_exact():
    offs = [0.3, -0.1, 0.2]
    rows = [each for off in offs for each in on_a_line(off) if each["seed"] == offs.index(off)]
    found, student = dopr_of(rows).residual, over_seeds(offs)
    assert found.mean == pytest.approx(student.mean)
    assert found.hi - found.lo == pytest.approx(student.hi - student.lo, rel=0.1)  # 1000 resamples


def test_two_bases_are_too_few_for_a_placebo():
    assert placebo(on_a_line(0.0)) == {}


def test_a_seed_without_a_finished_base_is_left_out():
    """All bases of one seed diverged, or only the variant ran it."""
    rows = on_a_line(-0.3)
    others = [r for r in rows if r["seed"] != 1 or r["variant"] == "dopr-adamw"]
    found = dopr_of(others)
    assert (found.n_inside, found.n) == (2, 3)
    assert found.residual.mean == pytest.approx(-0.3)
