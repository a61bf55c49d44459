"""Leaderboards and fits on records whose answers are known."""

import json
import lzma
import math

import numpy as np
import pytest
from scipy import stats

from studies.stats.analysis import leaderboard, references, seed_curves, sweeps
from studies.stats.records import AnalysisError, load_records, log_error, teacher_forced
from tests.studies.records import record

BASE, DOPR = [4.0, 5.0, 6.0], [3.0, 4.5, 4.0]


def study():
    rows = [record("adamw", seed, value) for seed, value in enumerate(BASE)]
    return rows + [record("dopr-adamw", seed, value) for seed, value in enumerate(DOPR)]


def test_the_leaderboard_is_sorted_and_compares_with_the_base_on_the_same_seeds():
    best, base = leaderboard(study()[::-1])  # the order of the records does not matter
    assert (best.variant, base.variant) == ("dopr-adamw", "adamw")
    expected = stats.ttest_rel(np.log(DOPR), np.log(BASE))  # ratios of errors
    assert best.versus_base.difference.mean == pytest.approx(np.log(np.divide(DOPR, BASE)).mean())
    assert best.versus_base.p == pytest.approx(expected.pvalue)
    assert best.versus_base.wins == 3
    assert base.versus_base is None
    interval = expected.confidence_interval(0.95)
    assert best.versus_base.difference.lo == pytest.approx(interval.low)


def test_a_variant_is_also_compared_with_its_base_at_its_own_rate():
    rows = [each | {"lr": 0.02} if each["base"] != each["variant"] else each for each in study()]
    at_other_rates = [record("adamw", seed, 9.0, role="control", lr=0.04) for seed in range(3)]
    controls = [record("adamw", seed, 2.0, role="control", lr=0.02) for seed in range(3)]
    best, base = leaderboard([*rows, *at_other_rates, *controls])
    assert best.at_this_rate.difference.mean == pytest.approx(np.log(np.divide(DOPR, 2)).mean())
    assert best.versus_base == leaderboard(rows)[0].versus_base  # a control is not reported
    assert (base.primary.n, base.at_this_rate) == (3, None)
    assert leaderboard(rows)[0].at_this_rate is None  # unknown
    same, _ = leaderboard(study())
    assert same.at_this_rate == same.versus_base


def test_what_lacks_seeds_of_others_stands_below_them():
    pairs = [("adamw", 5.0), ("muon", 4.0)]
    rows = [record(name, seed, value) for name, value in pairs for seed in (0, 1)]
    easy = [record("sgd", 1, 0.1)]  # an instance on which all might be as good
    diverged = [record("signum", seed, value) for seed, value in enumerate((0.1, None))]
    found = [(row.variant, row.n_missing) for row in leaderboard([*diverged, *easy, *rows])]
    assert found == [("muon", 0), ("adamw", 0), ("sgd", 1), ("signum", 0)]
    apart = leaderboard([record("adamw", 1, 2.0), record("muon", 2, 1.0)])  # single runs, perhaps
    assert [row.variant for row in apart] == ["muon", "adamw"]


def test_where_higher_is_better_order_and_wins_turn_around():
    rows = [
        each | {"higher_is_better": True, "grade": {"metrics": {"accumulated_kl": {"mean": value}}}}
        for each, value in zip(study(), 0.1 * np.array([*BASE, *DOPR]), strict=True)
    ]
    best, worst = leaderboard(rows)
    assert (best.variant, worst.versus_base.wins) == ("adamw", 0)
    expected = np.log((1 - 0.1 * np.array(DOPR)) / (1 - 0.1 * np.array(BASE))).mean()
    assert worst.versus_base.difference.mean == pytest.approx(expected)


def test_errors_are_compared_as_logarithms_and_none_counts_as_half_an_episode():
    assert log_error(record("adamw", 0, 0.25)) == pytest.approx(math.log(0.25))
    assert log_error(record("adamw", 0, 0.0)) == pytest.approx(math.log(0.5 / 9))  # of 8 episodes
    assert log_error(record("adamw", 0, 1.0, higher_is_better=True)) == pytest.approx(
        math.log(0.5 / 9)
    )
    deviation = record("adamw", 0, 3.0)
    deviation["primary"] = "log10_deviation"
    deviation["grade"]["metrics"]["log10_deviation"] = {"mean": 3.0}
    assert log_error(deviation) == pytest.approx(math.log(1000))
    assert math.isnan(log_error(record("adamw", 0, None)))


def test_references_are_averaged_over_seeds_and_stay_out_of_the_leaderboard():
    rows = [record("oracle", seed, 2.0 * seed, role="reference") for seed in (1, 2)]
    loss, metric = references(rows)["oracle"]
    assert (loss.mean, metric.mean, metric.n) == (1.0, 3.0, 2)
    assert [row.variant for row in leaderboard([*study(), *rows])] == ["dopr-adamw", "adamw"]


def test_an_outlying_seed_does_not_decide_the_order():
    steady = [record("adamw", seed, value) for seed, value in enumerate([4.0, 4.0, 4.0])]
    outlier = [record("muon", seed, value) for seed, value in enumerate([1.0, 1.0, 20.0])]
    first, second = leaderboard([*steady, *outlier])
    assert (first.variant, second.variant) == ("muon", "adamw")  # 20^(1/3) = 2.7 < 4 < 22 / 3
    assert (first.median, first.primary.mean) == (1.0, pytest.approx(22 / 3))


def test_tuning_runs_do_not_enter_the_leaderboard():
    rows = [*study(), record("dopr-adamw", 9, 0.001, role="tuning")]
    assert leaderboard(rows)[0].primary.mean == pytest.approx(np.mean(DOPR))


def test_a_diverged_run_loses_its_pair_and_puts_its_optimizer_last():
    rows = [*study(), record("dopr-adamw", 3, None), record("adamw", 3, 9.0)]
    last = leaderboard(rows)[-1]
    assert (last.variant, last.n_diverged) == ("dopr-adamw", 1)
    assert (last.versus_base.wins, last.versus_base.n_pairs) == (3, 4)
    assert last.versus_base.difference.n == 3  # its interval knows finished pairs only


def test_a_diverged_base_loses_its_pair_too_and_two_diverged_runs_decide_nothing():
    rows = [*study(), record("dopr-adamw", 3, 1.0), record("adamw", 3, None)]
    rows += [record("dopr-adamw", 4, None), record("adamw", 4, None)]
    board = {row.variant: row for row in leaderboard(rows)}
    assert (board["dopr-adamw"].versus_base.wins, board["dopr-adamw"].versus_base.n_pairs) == (4, 5)


def test_an_optimizer_that_always_diverged_has_no_numbers():
    rows = [*study(), *(record("fast-dopr-adamw", seed, None) for seed in range(3))]
    last = leaderboard(rows)[-1]
    assert (last.variant, last.versus_base.wins) == ("fast-dopr-adamw", 0)
    assert math.isnan(last.primary.mean)
    assert last.versus_base.difference.n == 0


def test_curves_have_a_band_over_seeds_and_a_single_run_its_own():
    mean, lo, hi = seed_curves(study(), "B")["adamw"]
    half = stats.t.ppf(0.975, 2) * np.std(BASE, ddof=1) / np.sqrt(3)
    assert mean == pytest.approx([1.0, 5.0])
    assert (lo[1], hi[1]) == pytest.approx((5.0 - half, 5.0 + half))
    single = seed_curves([record("adamw", 0, 4.0, role="single")], "B")["adamw"]
    assert [each.tolist() for each in single] == [[1.0, 4.0], [0.0, 0.0], [2.0, 9.0]]


def test_a_sweep_is_sorted_by_rate_and_averages_tuning_seeds():
    rows = [record("adamw", seed, 2.0, role="tuning", lr=0.2, val_loss=3.0) for seed in (0, 1)]
    rows += [record("adamw", 0, 1.0, role="tuning", lr=0.1), record("adamw", 1, 5.0, lr=0.1)]
    assert sweeps(rows) == {"adamw": [(0.1, 1.0, 1.0), (0.2, 3.0, 2.0)]}


def test_instances_of_other_entropy_are_compared_by_their_oracle_kl():
    row = record("adamw", 0, 1.0, val_loss=3.0)
    row["grade"]["metrics"]["val_kl"] = {"mean": 0.25}
    assert teacher_forced(row) == 0.25
    assert teacher_forced(record("adamw", 0, 1.0, val_loss=3.0)) == 3.0
    assert math.isnan(teacher_forced(record("adamw", 0, None)))


def test_records_come_from_studies_and_from_graded_runs(tmp_path):
    (tmp_path / "study").mkdir()
    lines = "".join(json.dumps(each) + "\n" for each in study())
    (tmp_path / "study/records.jsonl").write_text(lines)
    (tmp_path / "run/ttf").mkdir(parents=True)
    for step in (100, 200):
        row = record("muon", 0, 1.0, steps=step)
        (tmp_path / f"run/ttf/step-{step:08d}.json").write_text(json.dumps(row))
    rows = load_records([tmp_path / "study", tmp_path / "run"])
    assert rows[:-1] == study()
    assert rows[-1]["steps"] == 200  # a run counts once, at its last graded step


def test_a_folder_without_grades_is_an_error_that_says_what_to_run(tmp_path):
    with pytest.raises(AnalysisError, match=r"python -m eval\.rollout\.ttf"):
        load_records([tmp_path])


def test_a_record_that_was_cut_short_is_an_error_that_names_its_folder(tmp_path):
    (tmp_path / "records.jsonl").write_text('{"task": "pdfa"')
    with pytest.raises(AnalysisError, match=r"records\.jsonl: expected one JSON record per"):
        load_records([tmp_path])


def test_compressed_records_are_read_where_there_are_no_others(tmp_path):
    path, rows = tmp_path / "records.jsonl", study()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.with_name("records.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    assert load_records([tmp_path]) == rows
    path.write_text(json.dumps(rows[0]))
    assert load_records([tmp_path]) == rows[:1]
