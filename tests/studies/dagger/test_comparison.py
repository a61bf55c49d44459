"""Test the four combinations of method and DoPr: equal settings, separate tuning seeds."""

import json
import math

import numpy as np
import pytest

from studies.dagger import comparison, trial
from studies.dagger.__main__ import main
from studies.dagger.comparison import (
    CLONING,
    DAGGER,
    FRESH_SEEDS,
    METHODS,
    METRICS,
    Setup,
    key_of,
    measure,
)
from studies.sweep.compare import parse, study_of
from studies.sweep.run_cache import TrialError
from studies.sweep.study import FRESH
from studies.sweep.trial import run_trial
from studies.sweep.variants import parse_variant
from tests.studies.dagger.small import small_trial
from tests.studies.records import record

BASE, DOPR = "adamw", "fast-dopr-adamw"
N_SEEDS = len(FRESH_SEEDS)


@pytest.mark.parametrize("task", METRICS)
@pytest.mark.parametrize("variant", [BASE, "fast-dopr-muon"])
def test_both_methods_have_the_settings_of_the_benchmark(task, variant):
    command = ["--task", task, "--optimizers", variant, "--seeds", str(N_SEEDS)]
    study = study_of(parse(command)[1])
    theirs = study.trial(parse_variant(variant), "fresh", 0.5, 400)
    for method in METHODS:
        own = Setup(task, variant, method).trial("fresh", 0.5, 400, study.n)
        folder = f"--out_dir={theirs.folder}"
        assert own.command == [
            f"--out_dir={own.folder}" if word == folder else word for word in theirs.command
        ]
        assert METRICS[task][0] == own.task.primary
    assert not {*FRESH_SEEDS} & {0, 1, *range(FRESH, FRESH + 8)}


def test_a_run_of_dagger_is_recorded_once_and_never_mistaken_for_another(tmp_path, monkeypatch):
    own = small_trial(tmp_path, DOPR, DAGGER)
    first = run_trial(own)
    assert first["grade"]["metrics"]["jeffreys"]["n"] == own.n
    assert (first["label_share"], first["role"], first["base"]) == (1, "tuning", BASE)
    cloning = run_trial(small_trial(tmp_path, DOPR, CLONING))
    assert {*cloning} - {"grading", "seconds", "command"} <= {*first}
    assert cloning["val_loss"] != first["val_loss"]
    monkeypatch.setattr(trial, "train", lambda *_: pytest.fail("trained again"))
    assert run_trial(own) == first
    monkeypatch.setattr(trial, "OWN_SHARE", 0.25)
    with pytest.raises(TrialError, match=r"own_share was 0\.5, is 0\.25; delete the folder"):
        run_trial(own)


def test_without_a_share_a_run_has_the_record_of_cloning(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "OWN_SHARE", 0.0)
    own, cloning = (run_trial(small_trial(tmp_path, DOPR, method)) for method in METHODS)
    assert own["val_loss"] == cloning["val_loss"]
    assert own["grade"]["metrics"] == cloning["grade"]["metrics"]


def test_a_run_that_diverges_is_recorded_without_a_grade(tmp_path):
    found = run_trial(small_trial(tmp_path, BASE, DAGGER, lr=1e30))
    assert (found["val_loss"], found["grade"]) == (None, None)


def graded(own, value):
    """Return the record of a trial whose metrics all have this value."""
    grade = {"metrics": {key: {"mean": value, "n": own.n} for key in METRICS[own.task.name]}}
    made = record(own.variant, own.seed, value, label_share=0.5, val_loss=value)
    return made | {"grade": grade, "primary": own.task.primary}


def test_every_combination_is_tuned_on_one_seed_and_measured_on_others(monkeypatch):
    def run(own):
        assert (own.role, own.n) == (("fresh", 512) if own.seed else ("tuning", 1))
        value = abs(math.log2(own.lr / 0.016)) + 1 if own.seed == 0 else own.seed
        return graded(own, value if own.lr < 0.03 else None)  # higher rates diverge

    monkeypatch.setattr(comparison, "run_trial", run)
    for method in METHODS:
        row = measure(Setup("pdfa", DOPR, method))
        assert key_of(row) == Setup("pdfa", DOPR, method)
        assert (row["lr"], row["sweep"][0.032]) == (0.016, math.inf)
        assert row["val_loss"] == row["jeffreys"] == [*FRESH_SEEDS]
        assert row["log_error"] == pytest.approx(np.log(FRESH_SEEDS))
        assert ("label_share" in row) == (method == DAGGER)


def test_a_fresh_run_that_diverged_has_no_metrics(monkeypatch):
    def run(own):
        value = abs(math.log2(own.lr / 4e-3)) + 1 if own.seed == 0 else 1.0
        return graded(own, None if own.seed == 401 else value) | {"grade": None}

    monkeypatch.setattr(comparison, "run_trial", run)
    row = measure(Setup("nav", BASE, DAGGER))
    assert np.isnan(row["success"]).all()
    assert np.isnan(row["log_error"]).all()
    assert np.isnan(row["val_loss"]).tolist() == [False, True, False, False, False]


@pytest.fixture
def rows_of(monkeypatch):
    """Measure in this process; return the combinations that were measured."""
    measured = []

    def measure(setup):
        measured.append(setup)
        names = ("val_loss", "log_error", *METRICS[setup.task])
        numbers = {key: [1.0, 2.0, 3.0] for key in names}
        return vars(setup) | {"lr": 0.01, "sweep": {}} | numbers

    monkeypatch.setattr("studies.dagger.__main__.measure", measure)
    monkeypatch.setattr(
        "studies.rows.iterate_in_pool", lambda function, keys, _: map(function, keys)
    )
    return measured


def test_a_command_measures_four_rows_of_each_optimizer_and_keeps_earlier_ones(
    tmp_path, rows_of, capsys
):
    path = tmp_path / "rows.json"
    main(["--task", "pdfa", "--optimizers", "muon", "--out", str(path)])
    assert rows_of == [
        Setup("pdfa", variant, method)
        for variant in ("muon", "fast-dopr-muon")
        for method in METHODS
    ]
    main(["--task", "nav", "--optimizers", "adamw,adamw", "--out", str(path)])
    assert len(rows_of) == 8
    found = json.loads(path.read_text())
    assert [key_of(row) for row in found["rows"]] == rows_of
    assert (found["steps"], found["seeds"]) == (500, [*FRESH_SEEDS])
    printed = capsys.readouterr().out
    main(["--out", str(path), "--show"])
    assert len(rows_of) == 8
    assert capsys.readouterr().out == printed[printed.rindex("pdfa: jeffreys") :]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "chain"], "choose from"),
        (["--task", "pdfa", "--optimizers", "adam"], "--optimizers: adam: choose from adamw"),
        (["--task", "pdfa", "--optimizers", "dopr-adamw"], "dopr-adamw: choose from adamw"),
        (["--task", "pdfa", "--optimizers", ""], "(empty): choose from adamw"),
        (["--task", "pdfa", "--workers", "0"], "--workers: 0: must be at least 1"),
        (["--task", "pdfa", "--out", "nowhere/rows.json"], "folder nowhere does not exist"),
        (["--task", "pdfa", "--show"], "has no rows; run without --show"),
    ],
)
def test_a_wrong_command_is_refused_before_any_work(tmp_path, rows_of, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path / "rows.json"), *arguments])
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not rows_of


def test_a_run_that_fails_is_reported_in_one_line(tmp_path, rows_of, capsys, monkeypatch):
    def measure(setup):
        raise TrialError("runs/x holds another run; delete the folder")

    monkeypatch.setattr("studies.dagger.__main__.measure", measure)
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path / "rows.json")])
    assert capsys.readouterr().err == "error: runs/x holds another run; delete the folder\n"
