"""Test the sentences below a leaderboard, and the text tables in the terminal."""

import pytest

from studies.report.summary_text import (
    below_leaderboard,
    on_matched,
    on_ranks,
    on_seeds,
    on_sweeps,
    rank_agreement,
)
from studies.report.tables import leaderboard_text, matched_text
from studies.stats.analysis import leaderboard
from studies.sweep.compare import summary
from tests.studies.records import fresh, record
from tests.studies.stats.test_matched import noisy, on_a_line

ERRORS = {"adamw": 4.0, "muon": 2.0, "sgd": 8.0, "signum": 6.0}


def ranked(losses):
    """Return two seeds of each optimizer, with rollout errors as in ERRORS."""
    names = zip(ERRORS, losses, strict=True)
    return [record(v, seed, ERRORS[v], val_loss=loss) for v, loss in names for seed in (0, 1)]


@pytest.mark.parametrize(
    ("losses", "tau"), [((2, 1, 4, 3), 1), ((3, 4, 1, 2), -1), ((1, 2, 4, 3), 4 / 6)]
)
def test_tau_compares_the_orders_by_validation_and_by_rollouts(losses, tau):
    assert rank_agreement(ranked(losses)) == (pytest.approx(tau), 4)


def test_an_optimizer_with_a_diverged_run_or_fewer_seeds_has_no_rank():
    rows = [*ranked((2, 1, 4, 3)), record("adamw", 2, None)]
    assert rank_agreement(rows) == (pytest.approx(1), 3)
    assert rank_agreement([*rows, record("muon", 2, None)]) is None  # two optimizers are left
    assert on_ranks(rows[:2]) == ""
    more = [record(name, 9, 5.0) for name in ("adamw", "muon", "sgd")]
    assert rank_agreement([*ranked((2, 1, 4, 3)), *more])[1] == 3


def test_optimizers_that_lack_seeds_are_named():
    rows = [record(name, seed, 5.0) for name in ("adamw", "muon") for seed in (0, 1)]
    assert on_seeds(rows) == ""
    assert "adamw" in on_seeds([*rows, record("muon", 2, 5.0)])
    single = [record(name, seed, 5.0, role="single") for seed, name in enumerate(("adamw", "muon"))]
    assert on_seeds(single) == ""


def test_an_optimizer_that_diverges_at_every_rate_is_named():
    lost = [record("sgd", seed, None, role="tuning", lr=lr) for seed in (0, 1) for lr in (0.1, 0.2)]
    rows = [record("adamw", 0, 5.0), record("adamw", 0, 5.0, role="tuning")]
    assert on_sweeps(rows) == ""
    (text,) = below_leaderboard([*rows, *lost])
    assert text.startswith("sgd has no fresh runs: a tuning run diverged")


def test_the_summary_gives_the_factor_that_a_difference_has_to_exceed():
    text = summary([each | {"seed": each["seed"] + 200} for each in noisy(0)])
    assert "Two base optimizers differ by up to × 1." in text
    assert "error / base's at equal validation" in text


def test_a_missing_comparison_at_equal_validation_is_explained():
    alone = [*fresh("adamw", [5.0, 6.0, 7.0]), *fresh("dopr-adamw", [3.0, 4.0, 5.0])]
    assert "but there are adamw" in on_matched(alone)
    assert "but there are adamw" in summary(alone)
    same = [record(name, 0, 2.0) for name in ("adamw", "muon")]
    assert "on no seed" in on_matched(same)
    assert "too few" in on_matched(on_a_line(0.0))
    assert matched_text({}, "error") == ""


@pytest.mark.parametrize(
    ("n_seeds", "loss", "errors", "comparison"),
    [
        # Logarithms of 2/4, 3/5, 4/6: mean -0.5365, sd 0.1455; t(0.975, 2) = 4.303.
        (3, "1 ± 0", "3 ± 2.5 3", "× 0.585 [0.407, 0.840] 3/3"),
        (2, "1", "2.5 2.5", "× 0.548 2/2"),
    ],
)
def test_the_text_leaderboard_has_means_medians_and_ratios(n_seeds, loss, errors, comparison):
    rows = [record("adamw", seed, 4.0 + seed) for seed in range(n_seeds)]
    rows += [record("dopr-adamw", seed, 2.0 + seed) for seed in range(n_seeds)]
    board = leaderboard_text(leaderboard(rows), {}, "kl", higher_is_better=False)
    best = " ".join(board.splitlines()[1].split())
    assert best.startswith(f"dopr-adamw 0.01 {loss} {errors} {comparison}")
