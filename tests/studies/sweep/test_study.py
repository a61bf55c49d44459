"""Sweeps, fresh seeds and the folder of a study."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from optim.build import MATRIX_OPTIMIZERS, OPTIMIZERS
from studies.sweep.compare import main, notes, study_of
from studies.sweep.compare import parse as parse_arguments
from studies.sweep.results import unite
from studies.sweep.run_cache import TrialError, differences, read_record
from studies.sweep.study import FRESH, GRIDS, SweepError, sweep
from studies.sweep.trial import run_trial
from studies.sweep.variants import parse_variant
from tests.studies.records import record
from tests.studies.small_studies import read_records

ROOT = Path(__file__).parents[3]
TINY = "pdfa,states=4,alphabet=4,horizon=8,n_documents=64"


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
    assert all(asked.count(lr) == 2 for lr in asked)  # tuning seeds


def test_a_rate_at_which_training_diverges_is_never_the_best(tmp_path):
    run, _ = loss_of(lambda lr: None if lr > 3e-3 else 1 - lr)
    assert sweep(study(tmp_path), parse_variant("adamw"), run) == 2e-3


def test_where_the_whole_grid_diverges_lower_rates_are_tried(tmp_path):
    run, _ = loss_of(lambda lr: None if lr > 3e-4 else abs(math.log2(lr / 1e-4)))
    assert sweep(study(tmp_path), parse_variant("adamw"), run) == 2e-3 / 16


def test_an_optimizer_without_a_grid_is_swept_from_1e_3_and_is_named(tmp_path, monkeypatch):
    monkeypatch.delitem(GRIDS, "adamw")
    run, asked = loss_of(lambda lr: abs(math.log2(lr / 4e-3)))
    new = study(tmp_path)
    assert sweep(new, parse_variant("adamw"), run) == 4e-3
    assert asked[::2] == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    assert notes(new).startswith("adamw: not in GRIDS")
    monkeypatch.undo()
    assert notes(new) == ""


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_adamw_beside_every_matrix_optimizer_has_one_rate(tmp_path, optimizer):
    point = study(tmp_path, task="pdfa").trial(parse_variant(optimizer), "fresh", 0.5, 7)
    assert ("aux_lr" in point.settings) == (optimizer in MATRIX_OPTIMIZERS)


def test_training_that_always_diverges_is_no_sweep(tmp_path):
    run, _ = loss_of(lambda lr: None)
    with pytest.raises(SweepError, match="no best learning rate inside"):
        sweep(study(tmp_path), parse_variant("adamw"), run)


def test_a_loss_that_only_falls_is_no_sweep(tmp_path):
    run, _ = loss_of(lambda lr: -lr)
    with pytest.raises(SweepError, match="no best learning rate inside"):
        sweep(study(tmp_path), parse_variant("adamw"), run)


@pytest.mark.parametrize("lost", ["adamw", "dopr-adamw"])
def test_a_variant_without_a_rate_does_not_keep_others_from_theirs(
    tmp_path, monkeypatch, capsys, lost
):
    def swept(study, variant, run):
        run([study.trial(variant, "tuning", 1e-3, seed) for seed in range(study.tuning_seeds)])
        if variant.name == lost:
            raise SweepError("none")
        return 1e-3

    monkeypatch.setattr("studies.sweep.study.sweep", swept)
    names = ["--optimizers", "adamw,dopr-adamw", "--seeds", "2", "--steps", "20"]
    main(["--task", "lds", *names, "--out", str(tmp_path)])
    fresh = [row["variant"] for row in read_records(tmp_path) if row["role"] == "fresh"]
    assert fresh == [{"adamw": "dopr-adamw", "dopr-adamw": "adamw"}[lost]] * 2
    said = f"{lost} has no fresh runs: no best one is known yet among the learning rates 0.001 to"
    assert said in capsys.readouterr().out


def test_a_variant_that_is_named_without_its_base_is_told_so(tmp_path):
    assert notes(study(tmp_path, "--optimizers", "dopr-adamw,sgd")).startswith(
        "dopr-adamw: adamw is not in this command"
    )
    assert notes(study(tmp_path, "--optimizers", "dopr-adamw,adamw")) == ""


def test_a_seed_is_the_instance_of_the_task_and_of_the_run(tmp_path):
    point = study(tmp_path, task="pdfa,states=8").trial(parse_variant("dopr-muon"), "fresh", 0.5, 7)
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
    assert "error / base's" in lines


def test_each_base_also_runs_at_the_rates_of_its_variants(tmp_path):
    names = "adamw,dopr-adamw,fast-dopr-adamw,dopr-adamw+gamma=1,dopr-sgd"
    new = study(tmp_path, "--optimizers", names, "--seeds", "2")
    rates = dict(zip(names.split(","), (0.1, 0.2, 0.1, 0.2, 0.3), strict=True))
    found = new.controls(rates)  # once at 0.2; sgd is not in this study
    assert [(p.variant, p.role, p.lr, p.seed) for p in found] == [
        ("adamw", "control", 0.2, FRESH + i) for i in range(2)
    ]
    assert "--dopr=False" in found[0].command


def test_controls_are_run_and_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(GRIDS, "adamw", (1e-3, 2e-3))
    rates = iter((1e-3, 2e-3))
    monkeypatch.setattr("studies.sweep.study.sweep", lambda *_: next(rates))
    names = ["--optimizers", "adamw,dopr-adamw", "--seeds", "2", "--steps", "20"]
    main(["--task", "lds", *names, "--out", str(tmp_path)])
    roles = [(row["variant"], row["role"]) for row in read_records(tmp_path)]
    assert roles.count(("adamw", "control")) == 2
    assert roles.count(("adamw", "fresh")) == 2
    board = capsys.readouterr().out.splitlines()
    assert len([line for line in board if line.startswith("dopr-adamw ") and line.count("×") == 2])


def test_a_control_that_is_asked_for_as_fresh_is_fresh(tmp_path):
    control = study(tmp_path, "--steps", "5").trial(parse_variant("adamw"), "control", 1e-3, FRESH)
    run_trial(control)
    assert run_trial(replace(control, role="fresh"))["role"] == "fresh"
    assert read_record(control.folder)["role"] == "fresh"


def test_another_study_is_not_mixed_into_a_folder(tmp_path):
    study(tmp_path).begin("first")
    with pytest.raises(ValueError, match="holds a study with another steps"):
        study(tmp_path, "--steps", "7").begin("second")


def test_a_run_in_a_worker_is_the_run_of_the_command(tmp_path):
    changes = ["n_embd=16", "n_head=1", "eval_batches=1"]
    settings = study(tmp_path, "--steps", "3", "--tokens_per_step", "32", "--episodes", "4",
                     "--set", *changes, task=TINY)  # fmt: skip
    point = settings.trial(parse_variant("dopr-adamw"), "tuning", 1e-3, 0)
    record = run_trial(point)
    by_hand = [each for each in point.command if not each.startswith("--out_dir")]
    command = [sys.executable, *by_hand, f"--out_dir={tmp_path / 'by_hand'}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    name = "checkpoints/step-00000003/model.safetensors"
    assert (point.folder / name).read_bytes() == (tmp_path / "by_hand" / name).read_bytes()
    assert record["role"] == "tuning"
    assert record["grade"]["metrics"]["accumulated_kl"]["n"] == 4


def test_settings_that_a_run_refuses_end_the_comparison_with_its_message(tmp_path):
    point = study(tmp_path, "--set", "init_from=nowhere", task=TINY).trial(
        parse_variant("adamw"), "tuning", 1e-3, 0
    )
    with pytest.raises(TrialError, match="failed: init_from=nowhere"):
        run_trial(point)
    assert "init_from=nowhere" in (point.folder / "train.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "lsd", "--optimizers", "adamw"], "did you mean 'lds'"),
        (["--task", "pdfa,state=3", "--optimizers", "adamw"], "did you mean 'states'"),
        (["--task", "lds", "--optimizers", "adam"], "NAME one of"),
        (["--task", "lds", "--optimizers", "adamw", "--seeds", "0"], "--seeds=0"),
        (["--task", "pdfa", "--optimizers", "adamw", "--set", "x"], "expected KEY=VALUE"),
        (["--task", "pdfa", "--optimizers", "adamw", "--set", "n_hed=2"], "did you mean 'n_head'"),
        (["--task", "pdfa", "--optimizers", "adamw", "--set", "lr=2"], "lr is fixed here"),
        (["--task", "pdfa", "--optimizers", "adamw", "--set", "n_head=3"], "divisible by n_head=3"),
        (["--task", "pdfa", "--optimizers", "adamw", "--set", "block_size=8"], "is fixed here"),
        (["--task", "pdfa", "--optimizers", "dopr-sgd+gamma=-1"], "gamma=-1"),
        (["--task", "pdfa", "--optimizers", "adamw,sgd,adamw"], "adamw is there more than once"),
        (["--task", "lds", "--optimizers", "adamw", "--set", "gamma=1"], "optimizer+gamma"),
        (["--task", "lds", "--optimizers", "dopr-adamw+exponent=3"], "exponent=3"),
        (["--task", "lds", "--optimizers", "adamw+gamma=1"], "task lds has no setting gamma"),
    ],
)
def test_a_wrong_command_is_one_message_before_any_work(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*arguments, "--out", str(tmp_path / "study")])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_other_optimizers_and_seeds_are_added_to_those_in_the_folder(tmp_path):
    name = "dopr-adamw+gamma=0.001"
    command = ["--task", "lds", "--steps", "60", "--tuning_seeds", "1", "--out", str(tmp_path)]
    main([*command, "--optimizers", "dopr-adamw+gamma=0.001", "--seeds", "2"])
    main([*command, "--optimizers", "adamw", "--seeds", "1"])
    fresh = [
        (row["variant"], row["seed"]) for row in read_records(tmp_path) if row["role"] == "fresh"
    ]
    assert fresh == [("adamw", FRESH), (name, FRESH), (name, FRESH + 1)]
    protocol = json.loads((tmp_path / "protocol.json").read_text())
    assert protocol["variants"][name]["gamma"] == 1e-3
    assert set(protocol["variants"]) == {"adamw", name}
    assert protocol["fresh_seeds"] == [FRESH, FRESH + 1]
    assert len(protocol["command"].splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not a protocol"), ("{}", "lacks command, fresh_seeds, n, ")]
)
def test_a_damaged_protocol_is_named_and_left_as_it_is(tmp_path, content, message):
    damaged = study(tmp_path)
    path = damaged.out / "protocol.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"protocol\.json: .*{message}"):
        damaged.begin("")
    assert path.read_text() == content


def test_a_variant_with_another_meaning_is_refused(tmp_path):
    first = study(tmp_path)
    first.begin("first")
    (variant,) = first.variants
    other = replace(variant, settings=(*variant.settings, ("eps", 1.0)))
    with pytest.raises(ValueError, match="holds a study with another adamw"):
        replace(first, variants=(other,)).begin("second")


def test_a_record_of_another_run_is_refused_by_name(tmp_path):
    point = study(tmp_path, "--steps", "5").trial(parse_variant("adamw"), "tuning", 1e-3, 0)
    assert run_trial(point) == run_trial(point)
    other = replace(point, settings=point.settings | {"max_steps": 6})
    with pytest.raises(TrialError, match="max_steps was 5, is 6; delete it or choose another"):
        run_trial(other)


def test_a_setting_that_train_did_not_have_then_had_its_default():
    now = {"lr": 0.1, "parallel": "ddp", "gamma": 0.1}
    assert not differences({"lr": 0.1}, now)
    assert differences({"lr": 0.1, "gamma": 1.0}, now) == {"gamma": "was 1.0, is 0.1"}
    assert differences({"lr": 0.1, "retired": 1}, now) == {"retired": "was 1, is None"}


def test_fresh_runs_at_a_new_rate_replace_those_at_the_old_one(tmp_path):
    path = tmp_path / "records.jsonl"
    old = [record("adamw", seed, 1.0, lr=0.01) for seed in (200, 201)]
    others = [record("adamw", 0, 1.0, lr=0.01, role="tuning"), record("sgd", 200, 1.0, lr=0.01)]
    unite(path, [*old, *others])
    new = record("adamw", 200, 2.0, lr=0.02)
    rows = unite(path, [new])
    found = [(row["variant"], row["lr"], row["seed"]) for row in rows]  # none of seed 201
    assert found == [("adamw", 0.01, 0), ("adamw", 0.02, 200), ("sgd", 0.01, 200)]
    assert read_records(tmp_path) == rows
