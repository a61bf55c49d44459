"""A run refuses settings, data and checkpoints that it cannot use, and names what changed."""

import os
import re
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import filelock
import pytest
import torch

import train
from tests.tiny import argv, metrics, weights, write_dataset
from tests.trainer.tiny_checkpoint import change_manifest
from trainer.machine import device_of, machine_problems
from trainer.parallel import FROM_TORCHRUN
from trainer.settings import TrainConfig

ROOT = Path(__file__).parent.parent


def test_a_run_does_not_go_past_its_end_or_over_another_run(dataset, tmp_path, capsys):
    assert train.main(argv(dataset, tmp_path / "a")) == 0
    assert train.main(argv(dataset, tmp_path / "a", max_steps=8)) == 1
    assert "raise max_steps" in capsys.readouterr().err
    assert train.main(argv(dataset, tmp_path / "b")) == 0
    there = tmp_path / "a/checkpoints/step-00000008"
    assert train.main(argv(dataset, tmp_path / "b", resume=there)) == 1
    assert "holds another run" in capsys.readouterr().err


def test_other_data_under_the_same_name_is_noticed(tmp_path, capsys):
    train.main(argv(write_dataset(tmp_path / "old"), tmp_path / "run", max_steps=4))
    new = write_dataset(tmp_path / "new", seed=1)
    assert train.main(argv(new, tmp_path / "run")) == 0
    assert "is not the data that" in capsys.readouterr().out


def test_two_runs_do_not_share_an_out_dir(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    with filelock.FileLock(out / ".lock"):
        code = subprocess.run(
            [sys.executable, "train.py", *argv(dataset, out)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert code.returncode == 1
    assert "another run is writing to it" in code.stderr


def test_an_out_dir_that_cannot_be_written_fails_before_anything_else(dataset, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train.main(argv(dataset, tmp_path / "file" / "run")) == 1
    assert "not writable" in capsys.readouterr().err


BAD = {
    "unprepared": ({"dataset": "fineweb"}, r"python -m data\.fineweb\.prepare"),
    "misspelt": ({"dataset": "finweb"}, "did you mean 'fineweb'"),
    "too-short": ({"block_size": 5000}, "block_size=5000 needs at least 5,001"),
    "no-checkpoint": ({"resume": "/nowhere"}, "no checkpoint at /nowhere"),
    "cuda": ({"device": "cuda"}, "torch finds no CUDA device"),
    "init_from": ({"init_from": "/nowhere"}, "init_from=/nowhere"),
    "pattern": ({"dopr": True, "include": "nonsense"}, "nonsense.* matches no module"),
    "eps": ({"optimizer": "adamuon", "eps": 0}, "error: .*eps=0"),
    "many": ({"n_head": 5, "gamma": -1, "dopr": True, "lr": "x"}, r"(?s)lr='x'.*gamma.*n_embd=32"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_error_before_any_work(dataset, tmp_path, capsys, changes, message):
    if "cuda" in str(changes) and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert train.main(argv(dataset, tmp_path / "run", **changes)) == 1
    output = capsys.readouterr()
    assert re.search(message, output.err)
    assert "Traceback" not in output.err
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_spaces_between_the_names_of_layers_are_ignored(dataset, tmp_path, capsys):
    names = {"include": "transformer.h.0.*, transformer.h.1.*", "exclude": "*c_attn , *c_fc"}
    assert train.main(argv(dataset, tmp_path / "run", dopr=True, max_steps=3, **names)) == 0
    assert "DoPr covers 4 weights" in capsys.readouterr().out


def test_an_untied_head_is_covered_if_it_is_named(dataset, tmp_path, capsys):
    changes = {"dopr": True, "tie_weights": False, "include": "lm_head", "max_steps": 3}
    assert train.main(argv(dataset, tmp_path / "run", **changes)) == 0
    assert "DoPr covers 1 weights" in capsys.readouterr().out


def test_a_checkpoint_of_another_model_optimizer_or_tokenizer_is_refused(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(argv(dataset, out, max_steps=4))
    before = weights(out, 4)
    for changes, message in (
        ({"n_embd": 64}, r"wte.weight is \(257, 32\), the model's is \(257, 64\)"),
        ({"optimizer": "sgd", "lr": 0.1}, "written with optimizers .*AdamW"),
        ({"dopr": True}, "written without DoPr"),
        ({"ema_decay": 0.9}, "holds no averaged weights"),
        ({"resume": "never"}, "holds a run"),
    ):
        assert train.main(argv(dataset, out, **changes)) == 1
        assert re.search(message, capsys.readouterr().err)
    assert weights(out, 4) == before


def test_a_checkpoint_with_setting_names_of_an_earlier_release_is_resumed(
    dataset, tmp_path, capsys
):
    out = tmp_path / "run"
    train.main(argv(dataset, out, max_steps=4))

    def rename(manifest):
        manifest["config"]["kernel"] = manifest["config"].pop("backend")

    change_manifest(out / "checkpoints/step-00000004", rename)
    with pytest.warns(FutureWarning, match="settings of an earlier release: kernel"):
        assert train.main(argv(dataset, out)) == 0
    output = capsys.readouterr().out
    assert "resumed" in output
    assert "backend was" not in output


def test_settings_that_change_on_resume_are_named(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(argv(dataset, out, max_steps=4))
    assert train.main(argv(dataset, out, lr=1e-3)) == 0
    assert "warning: lr was 0.003 and is 0.001 from here on" in capsys.readouterr().out
    assert metrics(out, "train")[-1]["lr"] < 1e-3  # the new rate is used


def test_a_world_that_torchrun_did_not_start_is_refused(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main(argv(dataset, tmp_path / "run")) == 1
    assert "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set" in capsys.readouterr().err


def test_more_processes_than_devices_are_refused(dataset, tmp_path, monkeypatch, capsys):
    for key in FROM_TORCHRUN:
        monkeypatch.setenv(key, "0")
    for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(key, "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert train.main(argv(dataset, tmp_path / "run", device="cuda", micro_batch_size=2)) == 1
    assert "2 processes on this machine, but torch finds 1 CUDA devices" in capsys.readouterr().err


def test_the_lock_is_released_when_the_run_ends(dataset, tmp_path):
    out = tmp_path / "run"
    train.main(argv(dataset, out, max_steps=3))
    with filelock.FileLock(out / ".lock", blocking=False):
        assert os.path.exists(out / ".lock")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc' must be a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 must be at least 1"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE='x' must be a whole number"),
    ],
)
def test_variables_of_torchrun_that_make_no_sense_are_named(
    dataset, tmp_path, monkeypatch, capsys, variables, message
):
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert train.main(argv(dataset, tmp_path / "run")) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_whose_peers_do_not_come_says_so(dataset, tmp_path, monkeypatch, capsys, rank):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
    for key, value in {**variables, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(key, str(value))
    assert train.main(argv(dataset, tmp_path / "run", timeout_s=1)) == 1
    assert "the 2 processes did not find each other within 1 s" in capsys.readouterr().err


def test_shards_of_more_processes_than_there_are_are_refused(dataset, tmp_path, capsys):
    changes = {"parallel": "hsdp", "shard_size": 3}
    assert train.main(argv(dataset, tmp_path / "run", **changes)) == 1
    assert "shard_size=3: must divide the number of processes, 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("is_there", "changes", "message"),
    [
        (False, {}, "torch finds no MPS device"),
        (True, {"dopr": True}, "DoPr needs float64"),
        (True, {"dtype": "bfloat16"}, "needs macOS 14"),
    ],
)
def test_mps_is_refused_with_what_is_missing(monkeypatch, is_there, changes, message):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: is_there)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: False)
    (problem,) = machine_problems(asdict(TrainConfig(device="mps", **changes)))
    assert message in problem


def test_mps_is_accepted_where_torch_has_it(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert machine_problems(asdict(TrainConfig(device="mps"))) == []
    assert device_of("mps") == torch.device("mps")
