"""Records that must not be pooled, or compared, are refused by name."""

import pytest

from studies.report.__main__ import main
from studies.stats.analysis import references
from studies.stats.consistency import check
from studies.stats.records import AnalysisError
from studies.sweep.compare import summary
from tests.studies.records import record
from tests.studies.small_studies import graded, study, write_study


def test_a_study_with_tuning_runs_and_references_is_consistent():
    oracle = [graded("oracle", seed, 0.0, role="reference", tokens=0) for seed in (100, 101)]
    check([*study(), *oracle, *oracle])


def test_a_run_that_is_there_twice_is_named():
    with pytest.raises(AnalysisError, match=r"task:pdfa, 500 steps, adamw, seed 100: 2 reported"):
        check([*study(), *study()])


def test_two_learning_rates_of_one_optimizer_are_not_pooled():
    same_seed = [record("adamw", 7, 1.0, lr=lr) for lr in (0.01, 0.02)]
    with pytest.raises(AnalysisError, match=r"adamw, seed 7: 2 reported records, lr 0\.01, 0\.02"):
        check(same_seed)
    other_seed = [record("adamw", 7, 1.0), record("adamw", 8, 1.0, lr=0.02)]
    with pytest.raises(AnalysisError, match=r"more than one learning rate, 0\.01, 0\.02"):
        check(other_seed)


def test_a_stale_record_is_an_error_of_the_page_and_of_the_terminal(tmp_path, capsys):
    rows = [*study(), study()[0]]
    assert main([str(write_study(tmp_path / "study", rows)), "--out", str(tmp_path / "out")]) == 2
    assert "adamw, seed 100: 2 reported records" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(AnalysisError, match="adamw, seed 100"):
        summary(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 9}, r"different tokens of training .*: 9 \(muon\); 512000 \(adamw\)"),
        ({"grading": {"n": 16}}, r"different graded episodes .*: 8 \(adamw\); 16 \(muon\)"),
        ({"grading": {"n": 8, "seed": 1}}, r"different seeds of the episodes .*1 \(muon\)"),
        ({"grading": {"n": 8, "seed": 0, "code": "b"}}, r"different versions of the grading code"),
        ({"settings": {"n_embd": 128}}, r"different models .*: n_embd=128 \(muon\)"),
    ],
)
def test_runs_of_other_means_do_not_share_a_leaderboard(changes, message):
    usual = {"grading": {"n": 8, "seed": 0, "code": "a"}, "settings": {"n_embd": 64}}
    rows = [graded("adamw", 0, 1.0, **usual), graded("muon", 0, 1.0, **usual | changes)]
    with pytest.raises(AnalysisError, match=message):
        check(rows)
    check([rows[0], graded("muon", 0, 1.0, **usual | {"settings": {"n_embd": 64, "mup": False}})])
    check([rows[0], rows[1] | {"steps": 600}])  # other lengths have boards of their own
    check([rows[0], rows[1] | {"spec": "task:pdfa,instance=1,states=9"}])


def test_controls_stand_beside_the_base_at_other_rates_and_by_the_same_means():
    control = graded("adamw", 100, 2.0, role="control", lr=0.08)
    check([*study(), control, control | {"lr": 0.16}])
    with pytest.raises(AnalysisError, match="adamw, seed 100: 2 reported"):
        check([*study(), control, control])
    with pytest.raises(AnalysisError, match="different graded episodes"):
        check([*study(), control | {"grading": {"n": 16}}])


def test_single_runs_are_told_apart_by_their_folders():
    runs = [graded("adamw", 0, 1.0, role="single", settings={"out_dir": name}) for name in "ab"]
    check(runs)
    check([runs[0], runs[1] | {"settings": {"out_dir": "b", "n_embd": 128}}])
    with pytest.raises(AnalysisError, match="adamw, seed 0"):
        check([*runs, runs[0]])


def test_references_of_two_folders_count_once_a_seed():
    rows = [record("oracle", seed, float(seed), role="reference") for seed in (1, 2, 3)]
    assert references([*rows, *rows]) == references(rows)
