"""A run survives kills, signals, non-finite steps, failed saves and damaged files."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train
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
    kill_and_compare(dataset, tmp_path, n_kills=2)


@pytest.mark.slow
def test_the_run_survives_fifty_kills_at_random_instants(dataset, tmp_path):
    kill_and_compare(dataset, tmp_path, n_kills=50)


def kill_and_compare(dataset, tmp_path, n_kills):
    changes = {"max_steps": 1000, "eval_every": 1000, "save_every": 1000, "log_every": 50}
    assert train.main(argv(dataset, tmp_path / "whole", **changes)) == 0
    out = tmp_path / "killed"
    latest = out / "checkpoints/latest"
    for i in range(n_kills):
        latest.unlink(missing_ok=True)  # its return shows that a checkpoint was written
        process = start(*argv(dataset, out, **changes | {"save_every": 1}))
        wait_for(latest.exists, process)
        time.sleep(0.001 * (37 * i % 101))  # anywhere in a step or in a save
        process.kill()
        process.communicate()
        found = checkpoint.newest_good(out / "checkpoints", pytest.fail)
        assert found is not None
        assert found.step < 1000, "the run must still be going when it is killed"
    assert train.main(argv(dataset, out, **changes)) == 0
    assert weights(out, 1000) == weights(tmp_path / "whole", 1000)
    assert not list((out / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
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


def poison(patch, *, steps, value=float("nan")):
    """Multiply the loss of these steps by a value that is not finite."""
    forward, calls = GPT.forward, 0

    def poisoned(self, idx, targets=None, **options):
        nonlocal calls
        logits, loss = forward(self, idx, targets, **options)
        if self.training:
            loss = loss * value if calls // 2 in steps else loss  # two micro-batches per step
            calls += 1
        return logits, loss

    patch.setattr(GPT, "forward", poisoned)


@pytest.mark.parametrize("dopr", [False, True])
def test_a_step_that_is_not_finite_is_skipped_and_counted(dataset, tmp_path, monkeypatch, dopr):
    poison(monkeypatch, steps={5})
    out = tmp_path / "run"
    changes = {"save_every": 1, "keep_checkpoints": 99, "dopr": dopr, "optimizer": "muon"}
    assert train.main(argv(dataset, out, max_steps=6, **changes)) == 0
    assert weights(out, 6) == weights(out, 5)  # step number 5 took the run from 5 to 6
    assert weights(out, 5) != weights(out, 4)
    before, after = (
        checkpoint.load_checkpoint(out / f"checkpoints/step-{i:08d}").train for i in (5, 6)
    )
    torch.testing.assert_close(before["optimizers"], after["optimizers"], rtol=0, atol=0)
    if dopr:
        for name, saved in before["dopr"].items():
            assert torch.equal(saved["sigma"], after["dopr"][name]["sigma"])
            assert not after["dopr"][name]["gram"].isnan().any()
    assert after["skipped"] == 1
    assert metrics(out, "train")[-1]["skipped"] == 1


def test_too_many_such_steps_end_the_run_and_name_the_last_checkpoint(
    dataset, tmp_path, monkeypatch, capsys
):
    poison(monkeypatch, steps=range(6, 99), value=float("inf"))
    assert train.main(argv(dataset, tmp_path / "run", max_skipped=3)) == train.EXIT_DIVERGED
    message = capsys.readouterr().err
    assert "3 steps in a row had a loss or gradient that was not finite" in message
    assert "step-00000004" in message  # step 8 followed a skipped step, so it was not saved


def test_a_failed_save_is_loud_and_training_goes_on_but_the_last_one_fails_the_run(
    dataset, tmp_path, monkeypatch, capsys
):
    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    assert train.main(argv(dataset, tmp_path / "run")) == 1
    output = capsys.readouterr()
    assert "WARNING: checkpoint" in output.out
    assert "No space left on device" in output.err
    assert metrics(tmp_path / "run", "train")[-1]["step"] == 12


def test_a_damaged_checkpoint_is_passed_over_and_the_result_is_the_same(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(argv(dataset, out))
    before = weights(out, 12)
    (out / "checkpoints/step-00000012/train.pt").write_bytes(b"x")
    assert train.main(argv(dataset, out)) == 0
    assert "step-00000012 is damaged (train.pt has 1 bytes" in capsys.readouterr().out
    assert weights(out, 12) == before


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
    assert checkpoint.open_checkpoint(out).step == 7


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
