"""Sentences below a leaderboard, on the page and in the terminal."""

import pytest

from studies.report.summary_text import (
    below_leaderboard,
    on_matched,
    on_ranks,
    on_seeds,
    on_sweeps,
    rank_agreement,
)
from studies.sweep.compare import summary
from tests.studies.records import record
from tests.studies.small_studies import fresh
from tests.studies.stats.test_matched import noisy, on_a_line

ERRORS = {"adamw": 4.0, "muon": 2.0, "sgd": 8.0, "signum": 6.0}


def ranked(losses):
    """Two seeds of each optimizer; rollout errors as in ERRORS."""
    names = zip(ERRORS, losses, strict=True)
    return [record(v, seed, ERRORS[v], val_loss=loss) for v, loss in names for seed in (0, 1)]


@pytest.mark.parametrize(
    ("losses", "tau"), [((2, 1, 4, 3), 1), ((3, 4, 1, 2), -1), ((1, 2, 4, 3), 4 / 6)]
)
def test_tau_counts_the_pairs_that_both_order_alike(losses, tau):
    assert rank_agreement(ranked(losses)) == (pytest.approx(tau), 4)


def test_a_diverged_optimizer_and_too_few_have_no_rank():
    rows = [*ranked((2, 1, 4, 3)), record("adamw", 2, None)]
    assert rank_agreement(rows) == (pytest.approx(1), 3)
    assert rank_agreement([*rows, record("muon", 2, None)]) is None
    assert on_ranks(rows[:2]) == ""


def test_an_optimizer_on_fewer_seeds_has_no_rank():
    rows = [*ranked((2, 1, 4, 3)), *(record(name, 9, 5.0) for name in ("adamw", "muon", "sgd"))]
    assert rank_agreement(rows)[1] == 3


def test_what_is_not_on_all_seeds_is_named():
    rows = [record(name, seed, 5.0) for name in ("adamw", "muon") for seed in (0, 1)]
    assert on_seeds(rows) == ""
    assert "others: adamw." in on_seeds([*rows, record("muon", 2, 5.0)])
    single = [record(name, seed, 5.0, role="single") for seed, name in enumerate(("adamw", "muon"))]
    assert on_seeds(single) == ""


def test_an_optimizer_that_diverges_at_every_rate_is_named():
    lost = [record("sgd", seed, None, role="tuning", lr=lr) for seed in (0, 1) for lr in (0.1, 0.2)]
    rows = [record("adamw", 0, 5.0), record("adamw", 0, 5.0, role="tuning")]
    assert on_sweeps(rows) == ""
    expected = (
        "sgd has no fresh runs: a tuning run diverged at each of the learning rates 0.1 to 0.2."
    )
    assert below_leaderboard([*rows, *lost]) == [expected]


def test_the_terminal_says_what_a_factor_has_to_exceed():
    text = summary([each | {"seed": each["seed"] + 200} for each in noisy(0)])
    assert "Kendall's tau between the orders of 6 optimizers" in text
    assert "Two base optimizers differ by up to × 1." in text
    assert "error / base's at equal validation" in text


def test_where_nothing_is_said_at_equal_validation_it_says_why():
    alone = [*fresh("adamw", [5.0, 6.0, 7.0]), *fresh("dopr-adamw", [3.0, 4.0, 5.0])]
    assert "two base optimizers, but there are adamw" in on_matched(alone)
    assert "but there are adamw" in summary(alone)
    same = [record(name, 0, 2.0) for name in ("adamw", "muon")]
    assert "on no seed do two base optimizers differ" in on_matched(same)
    assert "2 base optimizers are too few" in on_matched(on_a_line(0.0))
