"""A run survives kills, signals, non-finite steps, failed saves and damaged files."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train
from bench import kills
from model import GPT
from tests.tiny import argv, metrics, weights, write_dataset
from trainer.checkpoint import read as checkpoint

ROOT = Path(__file__).parent.parent


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "train.py", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(has_happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300  # a busy machine is slow
    while not has_happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "waited for five minutes"
        time.sleep(0.005)


def has_trained(out: Path) -> bool:
    log = out / "metrics.jsonl"
    return log.exists() and '"train"' in log.read_text()


def test_the_run_survives_kill_9_and_ends_as_if_nothing_had_happened(dataset, tmp_path):
    steps = 100
    changes = {"max_steps": steps, "eval_every": steps, "save_every": steps, "log_every": 50}
    assert train.main(argv(dataset, tmp_path / "whole", **changes)) == 0
    out = tmp_path / "killed"
    process = start(*argv(dataset, out, **changes | {"save_every": 1}))
    wait_for(lambda: (out / "checkpoints/latest").exists(), process)
    process.kill()  # test_twenty_kills_lose_and_change_nothing kills at other moments, too
    process.communicate()
    found = checkpoint.newest_good(out / "checkpoints", pytest.fail)
    assert found is not None
    assert found.step < steps, "the run must still be going when it is killed"
    assert train.main(argv(dataset, out, **changes)) == 0
    assert weights(out, steps) == weights(tmp_path / "whole", steps)
    assert not list((out / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize(
    "signum",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_run_quickly_with_a_checkpoint_and_no_traceback(
    dataset, tmp_path, signum
):
    out = tmp_path / "run"
    process = start(*argv(dataset, out, max_steps=100_000, save_every=100_000, loader_workers=1))
    wait_for(lambda: has_trained(out), process)
    os.killpg(process.pid, signum)  # like a terminal or a scheduler
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    assert "Traceback" not in output
    assert checkpoint.open_checkpoint(out).step > 0
    assert metrics(out, "run")[-1]["reason"] == f"stopped by {signum.name}"


@pytest.mark.parametrize(("n_good", "last_step"), [(0, None), (1, 12)])
def test_a_failed_save_is_loud_and_the_first_or_the_last_one_fails_the_run(
    dataset, tmp_path, monkeypatch, capsys, n_good, last_step
):
    write, calls = torch.save, []

    def disk_full(*args, **kwargs):
        calls.append(args)
        if len(calls) > n_good:
            raise OSError(28, "No space left on device")
        write(*args, **kwargs)

    monkeypatch.setattr(torch, "save", disk_full)
    assert train.main(argv(dataset, tmp_path / "run")) == 1
    output = capsys.readouterr()
    assert ("WARNING: checkpoint" in output.out) == bool(n_good)
    assert "no space left in" in output.err
    steps = [row["step"] for row in metrics(tmp_path / "run", "train")]
    assert (steps[-1] if steps else None) == last_step


def test_a_damaged_checkpoint_is_passed_over_and_the_result_is_the_same(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(argv(dataset, out))
    before = weights(out, 12)
    (out / "checkpoints/step-00000012/train.pt").write_bytes(b"x")
    assert train.main(argv(dataset, out)) == 0
    assert "step-00000012 is damaged (train.pt has 1 bytes" in capsys.readouterr().out
    assert weights(out, 12) == before


def test_a_run_without_a_usable_checkpoint_is_told_to_start_again(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(argv(dataset, out, max_steps=3, keep_checkpoints=1))
    (out / "checkpoints/step-00000003/train.pt").write_bytes(b"x")
    assert train.main(argv(dataset, out)) == 1
    output = capsys.readouterr()
    assert "Start again in a new out_dir" in output.err
    assert (output.out + output.err).count("train.pt has 1 bytes") == 1


def test_a_vanished_shard_is_named_and_nothing_trained_is_lost(tmp_path, monkeypatch, capsys):
    folder = write_dataset(tmp_path / "data")
    count_step = train.TrainState.count_step

    def counting(self, is_finite):
        count_step(self, is_finite)
        if self.step == 7:
            (folder / "train_000000.bin").rename(folder / "elsewhere")

    monkeypatch.setattr(train.TrainState, "count_step", counting)
    out = tmp_path / "run"
    assert train.main(argv(folder, out)) == 1
    assert "train_000000.bin" in capsys.readouterr().err
    assert checkpoint.open_checkpoint(out).step == 8  # its data had been read in the step before


@pytest.mark.parametrize("lost", ["val_000000.bin", "."])
def test_a_vanished_validation_set_or_folder_loses_nothing_either(tmp_path, monkeypatch, lost):
    folder = write_dataset(tmp_path / "data")
    count_step = train.TrainState.count_step

    def counting(self, is_finite):
        count_step(self, is_finite)
        if self.step == 6:  # validation is due
            (folder / lost).rename(tmp_path / "elsewhere")

    monkeypatch.setattr(train.TrainState, "count_step", counting)
    assert train.main(argv(folder, tmp_path / "run")) == 1
    assert checkpoint.open_checkpoint(tmp_path / "run").step == 6


def test_a_folder_that_is_removed_while_the_run_writes_to_it_is_created_again(
    dataset, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    count_step = train.TrainState.count_step

    def remove(self, is_finite):
        count_step(self, is_finite)
        if self.step == 5:
            shutil.rmtree(out)

    monkeypatch.setattr(train.TrainState, "count_step", remove)
    assert train.main(argv(dataset, out, async_save=False)) == 0  # step 4 is complete at step 5
    assert checkpoint.open_checkpoint(out).step == 12
    assert [row["step"] for row in metrics(out, "train")] == list(range(5, 13))


def test_a_folder_that_becomes_read_only_fails_the_last_save_only(
    dataset, tmp_path, monkeypatch, capsys
):
    mkdir, out = Path.mkdir, tmp_path / "run"

    def read_only(path, *args, **kwargs):
        if path.stem > "step-00000004":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert train.main(argv(dataset, out)) == 1
    output = capsys.readouterr()
    assert "step-00000008 could not be written" in output.out
    assert "step-00000004 is intact" in output.err
    assert metrics(out, "train")[-1]["step"] == 12


def test_a_clock_that_jumps_back_does_not_change_the_records(dataset, tmp_path, monkeypatch):
    clock = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    assert train.main(argv(dataset, tmp_path / "run")) == 0
    rows = metrics(tmp_path / "run", "train")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(row["tokens_per_s"] > 0 and row["step_ms"] > 0 for row in rows)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("can't allocate memory: 8 bytes\nat x")],
)
def test_too_little_memory_is_one_line_with_the_remedy(
    dataset, tmp_path, monkeypatch, capsys, error
):
    def forward(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(GPT, "forward", forward)
    assert train.main(argv(dataset, tmp_path / "run")) == 1
    message = capsys.readouterr().err
    assert "micro_batch_size below 4" in message
    assert len(message.splitlines()) == 1


@pytest.mark.slow
def test_twenty_kills_lose_and_change_nothing():
    assert kills.main(["--kills", "20"]) == 0
