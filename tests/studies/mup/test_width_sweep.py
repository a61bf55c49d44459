"""Test the grid of a width sweep, its shards and agents, and a tiny sweep."""

import dataclasses
import itertools
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from studies.mup import update_ratio
from studies.mup.coordinates import measure_coordinates
from studies.mup.grid import grid, twins
from studies.mup.update_ratio import measure_update
from studies.mup.width_sweep import main, parse, settings_of
from studies.sweep.trial import train_in
from tests.studies.mup.width_records import TINY, record
from tests.tiny import argv
from trainer.checkpoint.read import load_checkpoint

ROOT = Path(__file__).parents[3]


def command(out, *more, dataset="pystdlib"):
    words = ["--out", str(out), "--workers", "1", "--steps", "4", *more]
    return [*words, "--set", f"dataset={dataset}", *TINY, "eval_batches=1"]


def runs_of(out, *more):
    _, arguments = parse(command(out, *more))
    return grid(arguments, settings_of(arguments.steps), measure_update)


def test_the_grid_has_every_combination_and_is_divided_into_shards(tmp_path):
    axes = ["--optimizers", "adamw,dopr-muon", "--widths", "16,32", "--octaves=-1:1"]
    whole = {run.folder for run in runs_of(tmp_path, *axes)}
    assert len(whole) == 2 * 2 * 3 * 3 * 2  # with seeds and parametrisations
    parts = [runs_of(tmp_path, *axes, "--shard", f"{i}/5") for i in range(1, 6)]
    shards = [{run.folder for run in part} for part in parts]
    assert set.union(*shards) == whole
    assert sum(map(len, shards)) == len(whole)


def test_a_run_at_the_base_width_counts_for_both_parametrisations(tmp_path):
    axes = ["--optimizers", "adamw", "--widths", "128,256", "--octaves=0", "--seeds", "0"]
    assert [(run.parametrisation, run.width) for run in runs_of(tmp_path, *axes)] == [
        *(("sp", 128), ("mup", 128), ("mup", 256))
    ]
    alone = runs_of(tmp_path, *axes, "--parametrisations", "sp")
    assert [(run.parametrisation, run.width) for run in alone] == [("sp", 128), ("sp", 256)]
    settings = {"n_head": 4, "mup_base_head_dim": None}
    mup = [record(width, 0.5, settings=settings | {"n_embd": width}) for width in (128, 256)]
    sp = record(128, 0.5, settings=settings | {"n_embd": 128, "mup": False})
    (twin,) = twins([*mup, sp])
    assert (twin["parametrisation"], twin["width"], twin["settings"]["mup"]) == ("sp", 256, False)
    assert twins([*mup, sp, twin]) == []
    assert twins(mup) == []


def test_an_octave_is_a_factor_of_two_on_the_rate_of_each_scale_of_muon(tmp_path):
    axes = ["--widths", "16", "--parametrisations", "mup", "--seeds", "0", "--octaves=0:1"]
    names = "muon,muon+adjust_lr=unit_rms_norm"
    found = runs_of(tmp_path, "--optimizers", names, *axes)
    assert [run.lr for run in found] == [2**-7, 2**-6, 2**-5, 2**-4]
    assert all(f"--aux_lr={2**-9}" in run.command for run in found)
    words = ["--out", str(tmp_path), "--optimizers", "muon", *axes]
    (run, _) = grid(
        parse([*words, "--set", *TINY, "adjust_lr=original"])[1], settings_of(4), measure_update
    )
    assert run.lr == 2**-5


def test_an_optimizer_without_a_rate_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(command(tmp_path, "--optimizers", "lion"))
    error = capsys.readouterr().err
    assert "optimizer lion has no rate here" in error
    assert error.count("\n") == 1


def test_the_agents_of_a_wandb_sweep_run_the_same_grid(tmp_path):
    axes = ["--optimizers", "adamw,dopr-sgd+gamma=1", "--widths", "16,32", "--octaves=-1,0"]
    words = [*command(tmp_path, *axes), "wandb_project=mine"]  # a setting of --set
    main([*words, "--wandb_sweep", str(tmp_path / "sweep.yaml")])
    sweep = json.loads((tmp_path / "sweep.yaml").read_text())
    parameters, found = sweep["parameters"], []
    for values in itertools.product(*(each["values"] for each in parameters.values())):
        words = sweep["command"][sweep["command"].index("studies.mup.width_sweep") + 1 :]
        place = words.index("${args}")
        words[place : place + 1] = [f"--{k}={v}" for k, v in zip(parameters, values, strict=True)]
        arguments = parse(words)[1]
        (run,) = grid(arguments, settings_of(arguments.steps), measure_update)
        assert run.settings["wandb"] == "online"
        found.append((run.folder, run.command[-6:]))
    wanted = [(run.folder, run.command[-6:]) for run in runs_of(tmp_path, *axes)]
    assert sweep["project"] == "mine"
    assert len(found) == 48
    assert sorted(found) == sorted(wanted)
    assert not (tmp_path / "runs").exists()


def test_the_update_ratio_measures_the_last_step(dataset, tmp_path):
    changes = {"max_steps": 5, "save_every": 4, "keep_checkpoints": 2, "optimizer": "signum"}
    changes |= {"lr": 1e-3, "weight_decay": 0, "schedule": "constant", "warmup_steps": 0}
    assert train_in(tmp_path / "run", ["train.py", *argv(dataset, tmp_path / "run", **changes)])
    found = measure_update(tmp_path / "run")["update_ratio"]
    model = load_checkpoint(tmp_path / "run/checkpoints/step-00000004").model
    names = [key for key in model if ".h." in key and model[key].dim() == 2]
    sizes = torch.stack([model[key].square().mean().sqrt() for key in names])
    assert len(names) == 8
    assert found == pytest.approx((1e-3 / sizes).log().mean().exp().item(), rel=1e-3)  # signs


def test_a_run_that_skipped_steps_has_no_update_ratio_and_no_coordinates(
    dataset, tmp_path, monkeypatch
):
    changes = {"max_steps": 8, "save_every": 1, "keep_checkpoints": 9, "warmup_steps": 0}
    assert train_in(tmp_path, ["train.py", *argv(dataset, tmp_path, **changes)])
    for number in (1, 7):  # a step that is skipped is not saved
        shutil.rmtree(tmp_path / f"checkpoints/step-{number:08d}")
    with pytest.raises(ValueError, match="last two steps"):
        measure_update(tmp_path)

    def skipped(path):
        checkpoint = load_checkpoint(path)
        return dataclasses.replace(checkpoint, train=checkpoint.train | {"skipped": 2})

    monkeypatch.setattr(update_ratio, "load_checkpoint", skipped)
    assert measure_update(tmp_path) == {"update_ratio": None}
    assert measure_coordinates(tmp_path) == {}


def test_a_sweep_writes_tables_and_plots_and_its_commands_repeat_its_runs(
    dataset, tmp_path, capsys
):
    axes = ["--optimizers", "adamw", "--widths", "16,32", "--octaves=-1:1", "--seeds", "0"]
    main(command(tmp_path, *axes, dataset=dataset))
    out = capsys.readouterr().out
    assert "12 runs, plots and transfer.md in" in out
    assert (tmp_path / "transfer.md").read_text().count("| adamw | mup |") == 3  # widths, verdict
    assert {path.name for path in tmp_path.glob("*.png")} == {"transfer.png", "update_ratio.png"}
    record = json.loads((tmp_path / "runs/adamw-mup-16-0-0/record.json").read_text())
    words = shlex.split(record["command"].partition(" ")[2].replace("NEW", str(tmp_path / "again")))
    subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True, capture_output=True)
    rows = map(json.loads, (tmp_path / "again/metrics.jsonl").read_text().splitlines())
    assert [row["loss"] for row in rows if row["kind"] == "val"][-1] == record["val_loss"]


def test_a_sweep_of_fewer_than_three_steps_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--optimizers", "adamw", "--steps", "2", "--out", str(tmp_path)])
    assert "--steps=2: must be at least 3" in capsys.readouterr().err
