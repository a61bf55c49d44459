"""Test that the study tunes on one seed, reports the others, and compares with the base twice."""

import json
import math

import pytest

from studies.finetune import arithmetic, pretrain, study
from studies.finetune.models import load
from studies.finetune.study import FinetuneResults, Pair, Run
from tests.studies.finetune.tiny import folder_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
BEST = {"adamw": 2e-3, "dopr-adamw": 4e-3}


def fake(results, run):
    """Return metrics whose best rate is BEST, and in which DoPr is 0.25 better."""
    loss = 1 + math.log2(run.lr / BEST[run.variant]) ** 2 + run.seed / 1e3
    metrics = dict.fromkeys(study.METRICS[1:], 0.5 + run.seed / 1e3)
    if run.variant == "dopr-adamw":
        metrics = {name: value + 0.25 for name, value in metrics.items()}
    return {"loss": loss, **metrics}


@pytest.fixture
def pretrained(tmp_path):
    return folder_of("gpt2", tmp_path / "pretrained" / "model")


def test_rates_are_tuned_on_one_seed_and_differences_are_paired(tmp_path, monkeypatch, pretrained):
    monkeypatch.setattr(FinetuneResults, "_train_and_grade", fake)
    results = FinetuneResults(tmp_path / "study.json", pretrained)
    pair = Pair(results, "dopr-adamw")
    assert pair.rates == BEST
    reported = {(run.variant, run.lr) for run in results.found if run.seed >= study.FIRST_SEED}
    assert reported == {("adamw", 2e-3), ("adamw", 4e-3), ("dopr-adamw", 4e-3)}
    assert {run.seed for run in results.found} == {study.TUNING_SEED, *range(100, 108)}
    found = pair.difference("base", "greedy")
    assert (found.mean, found.lo, found.n) == (pytest.approx(0.25), pytest.approx(0.25), 8)
    assert pair.difference("base at this rate", "loss").mean == pytest.approx(-1)
    assert "+0.250 [+0.250, +0.250]" in study.tables([pair])


def test_finished_runs_are_not_repeated_and_diverged_ones_are_left_out(
    tmp_path, monkeypatch, pretrained
):
    path = tmp_path / "study.json"
    monkeypatch.setattr(FinetuneResults, "_train_and_grade", fake)
    Pair(FinetuneResults(path, pretrained), "dopr-adamw")
    monkeypatch.setattr(FinetuneResults, "_train_and_grade", pytest.fail)
    results = FinetuneResults(path, pretrained)
    row = results.of(Run("adamw", 2e-3, 100))
    row.clear()
    row["loss"] = None
    assert Pair(results, "dopr-adamw").difference("base", "greedy").n == 7
    monkeypatch.setattr(study, "PROTOCOL", {})
    with pytest.raises(ValueError, match="another protocol; use another --out"):
        FinetuneResults(path, pretrained)


def test_the_command_pretrains_and_a_run_is_a_function_of_its_settings(
    tmp_path, monkeypatch, capsys
):
    """Run the real study with one pair, one seed and one rate."""
    for name in ("N_PRETRAIN", "N_TRAIN", "N_TEST"):
        monkeypatch.setattr(arithmetic, name, 100)
    shape = {"n_layer": 1, "n_embd": 16, "max_steps": 2, "warmup_steps": 1}
    monkeypatch.setattr(pretrain, "SETTINGS", pretrain.SETTINGS | shape)
    monkeypatch.setattr(study, "SIZES", {"n_train": 8, "n_test": 3, "steps": 2, "batch_size": 4})
    monkeypatch.setattr(study, "N_SEEDS", 1)
    monkeypatch.setattr(
        study, "search_rates", lambda loss_of, grid, name: {grid[0]: loss_of(grid[0])}
    )
    options = ["--pretrained", str(tmp_path / "model"), "--pairs=lora-dopr-adamw"]
    files = [tmp_path / name for name in ("first.json", "second.json")]
    for path in files:
        study.main(["--out", str(path), "--first_seed=7", *options])
    first, second = (json.loads(path.read_text())["rows"] for path in files)
    assert first == second
    assert {row["variant"] for row in first} == {"lora-adamw", "lora-dopr-adamw"}
    assert {row["seed"] for row in first} == {study.TUNING_SEED, 7}
    assert {*study.METRICS} < first[-1].keys()
    assert load(tmp_path / "model" / "model")[1]("7+5")["input_ids"] == [*b"7+5"]
    with pytest.raises(SystemExit):
        study.main(["--out", str(files[0]), "--pairs=adamw"])
    assert "adamw unknown" in capsys.readouterr().err


def test_runs_of_a_release_with_other_defaults_are_shown_but_no_new_ones_are_added(
    tmp_path, monkeypatch, pretrained
):
    path = tmp_path / "study.json"
    monkeypatch.setattr(FinetuneResults, "_train_and_grade", fake)
    Pair(FinetuneResults(path, pretrained), "dopr-adamw")
    content = json.loads(path.read_text())
    content["defaults"]["muon"]["ns_dtype"] = "bfloat16"
    path.write_text(json.dumps(content))
    results = FinetuneResults(path, pretrained)
    Pair(results, "dopr-adamw")
    with pytest.raises(ValueError, match=r"other default settings .* use another --out"):
        results.of(Run("adamw", 2e-3, 500))
    del content["defaults"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="with unknown default settings"):
        FinetuneResults(path, pretrained).of(Run("adamw", 2e-3, 500))


def test_runs_that_another_command_adds_meanwhile_are_kept(tmp_path, monkeypatch, pretrained):
    monkeypatch.setattr(FinetuneResults, "_train_and_grade", fake)
    first, second = (FinetuneResults(tmp_path / "study.json", pretrained) for _ in range(2))
    first.of(Run("adamw", 2e-3, 500))
    second.of(Run("adamw", 2e-3, 501))
    found = FinetuneResults(tmp_path / "study.json", pretrained).found
    assert {run.seed for run in found} == {500, 501}


def test_the_tuning_seed_is_not_reported(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        study.main(["--out", str(tmp_path / "study.json"), "--first_seed=-3"])
    assert "--first_seed=-3: must be at least 1" in capsys.readouterr().err


def test_a_rate_whose_loss_is_not_finite_is_never_the_best(tmp_path, monkeypatch, pretrained):
    def undefined_at_the_lowest(self, run):
        row = fake(self, run)
        return row | {"loss": math.nan} if run.lr == 1e-3 else row

    monkeypatch.setattr(FinetuneResults, "_train_and_grade", undefined_at_the_lowest)
    assert Pair(FinetuneResults(tmp_path / "study.json", pretrained), "dopr-adamw").rates == BEST
