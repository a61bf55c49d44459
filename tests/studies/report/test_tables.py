"""Tables for a terminal."""

from studies.report.tables import leaderboard_text, matched_text
from studies.stats.analysis import leaderboard
from tests.studies.records import record


def lines(n_seeds):
    rows = [record("adamw", seed, 4.0 + seed) for seed in range(n_seeds)]
    rows += [record("dopr-adamw", seed, 2.0 + seed) for seed in range(n_seeds)]
    board = leaderboard_text(leaderboard(rows), {}, "kl", higher_is_better=False)
    return [line.split() for line in board.splitlines()]


def test_the_leaderboard_has_means_intervals_medians_and_ratios():
    header, best, base = lines(3)
    assert header[-1] == "diverged"
    assert best[:9] == ["dopr-adamw", "0.01", "1", "±", "0", "3", "±", "2.5", "3"]
    assert base == ["adamw", "0.01", "1", "±", "0", "5", "±", "2.5", "5"]
    # Logarithms of 2/4, 3/5, 4/6: mean -0.5365, sd 0.1455; t(0.975, 2) = 4.303.
    assert best[9:14] == ["×", "0.585", "[0.407,", "0.840]", "3/3"]


def test_two_seeds_have_no_intervals():
    _, best, _ = lines(2)
    assert best == ["dopr-adamw", "0.01", "1", "2.5", "2.5", "×", "0.548", "2/2", "×", "0.548"]


def test_without_a_match_there_is_no_table():
    assert matched_text({}, "error") == ""
