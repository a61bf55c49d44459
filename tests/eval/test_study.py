"""Sweeps, fresh seeds and the folder of a study."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from eval.compare import main, study_of
from eval.compare import parse as parse_arguments
from eval.points import PointError, run_point
from eval.study import FRESH, sweep
from eval.variants import parse_variant

ROOT = Path(__file__).parents[2]


def study(tmp_path, *more, task="lds"):
    command = ["--task", task, "--optimizers", "adamw", "--out", str(tmp_path / "study"), *more]
    return study_of(parse_arguments(command)[1])


def loss_of(function):
    """A stand-in for training: the loss is a function of the rate; keeps the rates it was asked."""
    asked = []

    def run(points):
        asked.extend(point.lr for point in points)
        return [{"val_loss": function(point.lr)} for point in points]

    return run, asked


@pytest.mark.parametrize("best", [1e-4, 4e-3, 0.1])
def test_a_sweep_ends_with_the_best_rate_inside_the_grid(tmp_path, best):
    run, asked = loss_of(lambda lr: abs(math.log2(lr / best)))
    found = sweep(study(tmp_path), parse_variant("adamw"), run)
    assert abs(math.log2(found / best)) <= 0.5
    assert min(asked) < found < max(asked)
    assert len(asked) == len(set(asked))


def test_a_rate_at_which_training_diverges_is_never_the_best(tmp_path):
    run, _ = loss_of(lambda lr: None if lr > 3e-3 else 1 - lr)
    assert sweep(study(tmp_path), parse_variant("adamw"), run) == 2e-3


def test_a_loss_that_only_falls_is_no_sweep(tmp_path):
    run, _ = loss_of(lambda lr: -lr)
    with pytest.raises(PointError, match="no best learning rate inside"):
        sweep(study(tmp_path), parse_variant("adamw"), run)


def test_a_seed_is_the_instance_of_the_task_and_of_the_run(tmp_path):
    point = study(tmp_path, task="pdfa,states=8").point(parse_variant("dopr-muon"), "fresh", 0.5, 7)
    assert "instance=7" in point.task.spec
    assert "states=8" in point.task.spec
    assert {"--seed=7", "--lr=0.5", "--dopr=True", "--aux_lr=0.004"} <= set(point.command)


def test_a_comparison_reports_fresh_seeds_continues_and_can_be_extended(tmp_path, capsys):
    command = ["--task", "lds", "--steps", "60", "--seeds", "2", "--out", str(tmp_path)]
    main([*command, "--optimizers", "adamw"])
    first = capsys.readouterr().out
    main([*command, "--optimizers", "adamw,dopr-adamw"])
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    fresh = [row for row in rows if row["role"] == "fresh"]
    assert [(row["variant"], row["seed"]) for row in fresh] == [
        (variant, FRESH + i) for variant in ("adamw", "dopr-adamw") for i in range(2)
    ]
    lines = capsys.readouterr().out
    fresh_lines = [line for line in first.splitlines() if "fresh" in line]
    assert all(line in lines for line in fresh_lines)  # the same numbers and seconds: not run again
    assert "minus base" in lines


def test_another_study_is_not_mixed_into_a_folder(tmp_path):
    study(tmp_path).begin("first")
    with pytest.raises(ValueError, match="holds a study with another steps"):
        study(tmp_path, "--steps", "7").begin("second")


def test_a_run_in_a_worker_is_the_run_of_the_command(tmp_path):
    tiny = "pdfa,states=4,alphabet=4,horizon=8,n_documents=64"
    changes = ["n_embd=16", "n_head=1", "eval_batches=1"]
    settings = study(tmp_path, "--steps", "3", "--tokens_per_step", "32", "--episodes", "4",
                     "--set", *changes, task=tiny)  # fmt: skip
    point = settings.point(parse_variant("dopr-adamw"), "tuning", 1e-3, 0)
    record = run_point(point)
    by_hand = [each for each in point.command if not each.startswith("--out_dir")]
    command = [sys.executable, *by_hand, f"--out_dir={tmp_path / 'by_hand'}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    name = "checkpoints/step-00000003/model.safetensors"
    assert (point.folder / name).read_bytes() == (tmp_path / "by_hand" / name).read_bytes()
    assert record["role"] == "tuning"
    assert record["grade"]["metrics"]["accumulated_kl"]["n"] == 4


def test_settings_that_a_run_refuses_end_the_comparison_with_its_message(tmp_path):
    point = study(tmp_path, "--set", "n_head=3", task="pdfa").point(
        parse_variant("adamw"), "tuning", 1e-3, 0
    )
    with pytest.raises(PointError, match="ended with exit code 1; see"):
        run_point(point)
    assert "divisible by n_head=3" in (point.folder / "train.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "lsd", "--optimizers", "adamw"], "did you mean 'lds'"),
        (["--task", "pdfa,state=3", "--optimizers", "adamw"], "did you mean 'states'"),
        (["--task", "lds", "--optimizers", "adam"], "NAME one of"),
        (["--task", "lds", "--optimizers", "adamw", "--seeds", "0"], "--seeds=0"),
        (["--task", "lds", "--optimizers", "adamw", "--set", "x"], "wants KEY=VALUE"),
    ],
)
def test_a_wrong_command_is_one_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
