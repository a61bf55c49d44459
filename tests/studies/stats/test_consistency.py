"""Test that records are refused if they must not be pooled or compared."""

import pytest

from studies.report.__main__ import main
from studies.stats.consistency import check
from studies.stats.records import AnalysisError
from studies.sweep.compare import summary
from tests.studies.records import graded, record, study, write_study


def test_a_study_with_tuning_runs_and_repeated_references_is_accepted():
    oracle = [graded("oracle", seed, 0.0, role="reference", tokens=0) for seed in (100, 101)]
    check([*study(), *oracle, *oracle])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({}, "task:pdfa, 500 steps, adamw, seed 7: 2 reported records"),
        ({"lr": 0.02}, r"adamw, seed 7: 2 reported records, lr 0\.01, 0\.02"),
        ({"seed": 8, "lr": 0.02}, r"more than one learning rate, 0\.01, 0\.02"),
    ],
)
def test_an_optimizer_has_one_fresh_run_per_seed_and_one_learning_rate(second, message):
    run = record("adamw", 7, 1.0)
    with pytest.raises(AnalysisError, match=message):
        check([run, run | second])


def test_the_page_and_the_terminal_refuse_a_stale_record(tmp_path, capsys):
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
def test_runs_under_different_conditions_do_not_share_a_leaderboard(changes, message):
    usual = {"grading": {"n": 8, "seed": 0, "code": "a"}, "settings": {"n_embd": 64}}
    adamw, muon = record("adamw", 0, 1.0, **usual), record("muon", 0, 1.0, **usual)
    with pytest.raises(AnalysisError, match=message):
        check([adamw, muon | changes])
    check([adamw, muon | {"settings": {"n_embd": 64, "mup": False}}])  # the default of mup
    check([adamw, muon | changes | {"steps": 600}])  # another leaderboard
    check([adamw, muon | changes | {"spec": "task:pdfa,instance=1,states=9"}])


def test_controls_may_have_other_learning_rates_but_no_other_conditions():
    control = graded("adamw", 100, 2.0, role="control", lr=0.08)
    check([*study(), control, control | {"lr": 0.16}])
    with pytest.raises(AnalysisError, match="adamw, seed 100: 2 reported"):
        check([*study(), control, control])
    with pytest.raises(AnalysisError, match="different graded episodes"):
        check([*study(), control | {"grading": {"n": 16}}])


def test_single_runs_differ_by_folder_and_may_have_different_models():
    runs = [record("adamw", 0, 1.0, role="single", settings={"out_dir": name}) for name in "ab"]
    check(runs)
    check([runs[0], runs[1] | {"settings": {"out_dir": "b", "n_embd": 128}}])
    with pytest.raises(AnalysisError, match="adamw, seed 0"):
        check([*runs, runs[0]])
