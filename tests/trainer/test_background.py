"""Checkpoints written in the background are those that the training thread would have written."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from functools import partial
from pathlib import Path

import pytest

import train
from data.shards import DataError
from tests.tiny import argv, metrics, weights
from tests.trainer.delayed_writes import delayed_writes
from trainer import saving
from trainer.checkpoint import background, sharded, write
from trainer.checkpoint.read import (
    CheckpointError,
    candidates,
    load_checkpoint,
    newest_good,
)

ROOT = Path(__file__).parents[2]
DOPR = {"dopr": True, "refresh_every": 3, "sigma_beta": 0.9, "ema_decay": 0.5}
ADAMW = DOPR | {"fresh_mean": True}
MUON = DOPR | {"optimizer": "muon", "dropout": 0.1}
SCHEDULE_FREE = {"optimizer": "schedulefreeadamw", "schedule": "constant"}
SHARDED = {"checkpoint_format": "sharded"}
RUNS = {
    "adamw": ADAMW,
    "muon": MUON,
    "other weights are evaluated": SCHEDULE_FREE,
    "sharded adamw": ADAMW | SHARDED,
    "sharded, other weights are evaluated": SCHEDULE_FREE | SHARDED,
}


def content_of(path: Path) -> dict[str, object]:
    """Return the content of a checkpoint's files without what the time and the out_dir change."""
    files = {str(file.relative_to(path)): file for file in path.rglob("*") if file.is_file()}
    content: dict[str, object] = {name: file.read_bytes() for name, file in files.items()}
    manifest = json.loads((path / "manifest.json").read_bytes())
    del manifest["config"], manifest["sha256"]
    if "shards/.metadata" in files:  # has a random id and the path of the folder
        index = sharded._index(path / "shards")
        content["shards/.metadata"] = [index.state_dict_metadata, index.storage_data]
        del manifest["files"]["shards/.metadata"]
    return content | {"manifest.json": manifest}


QUICK = ("adamw", "sharded, other weights are evaluated")  # in `make test`


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in QUICK else [pytest.mark.slow]) for x in RUNS]
)
def test_a_write_while_training_goes_on_gives_the_same_bytes(dataset, tmp_path, name):
    settings = RUNS[name] | {"keep_checkpoints": 9}
    assert train.main(argv(dataset, tmp_path / "sync", **settings, async_save=False)) == 0
    with delayed_writes(3) as delayed:
        assert train.main(argv(dataset, tmp_path / "async", **settings)) == 0
    assert delayed == [7, 11]  # three steps after the saves that are neither the first nor the last
    for step in (0, 4, 8, 12):
        found, wanted = (
            content_of(tmp_path / run / f"checkpoints/step-{step:08d}") for run in ("async", "sync")
        )
        assert found.keys() == wanted.keys()
        assert [key for key in wanted if found[key] != wanted[key]] == []


@pytest.mark.parametrize("form", ["full", "sharded"])
def test_a_checkpoint_of_the_background_continues_bit_for_bit(dataset, tmp_path, form):
    settings = MUON | {"checkpoint_format": form, "keep_checkpoints": 9}
    with delayed_writes(3):
        assert train.main(argv(dataset, tmp_path / "whole", **settings)) == 0
    start = tmp_path / "whole/checkpoints/step-00000008"
    assert train.main(argv(dataset, tmp_path / "rest", **settings, resume=start)) == 0
    found, wanted = (
        sharded.read_all(load_checkpoint(tmp_path / run / "checkpoints/step-00000012").train)
        for run in ("rest", "whole")
    )
    assert repr(found) == repr(wanted)
    if form == "full":
        assert weights(tmp_path / "rest", 12) == weights(tmp_path / "whole", 12)


def fail_to_publish(patch, steps, error) -> None:
    """Raise an error when a checkpoint of one of these steps is complete but not yet renamed."""
    publish = write.publish

    def failing(partial, final):
        if int(final.name.removeprefix("step-")) in steps:
            raise error
        publish(partial, final)

    patch.setattr(write, "publish", failing)


@pytest.mark.parametrize("form", ["full", "sharded"])
@pytest.mark.parametrize(
    ("failing", "code", "kept", "trained"),
    [
        ({0}, 1, [], 0),
        pytest.param({4}, 0, [12, 8, 0], 12, marks=pytest.mark.slow),
        pytest.param({8}, 0, [12, 4, 0], 12, marks=pytest.mark.slow),
        ({4, 8}, 0, [12, 0], 12),
        ({8, 12}, 1, [4, 0], 12),
    ],
)
def test_the_first_or_last_failure_ends_the_run_and_another_one_is_a_warning(
    dataset, tmp_path, monkeypatch, capsys, form, failing, code, kept, trained
):
    out = tmp_path / "run"
    fail_to_publish(monkeypatch, failing, OSError(28, "No space left on device"))
    settings = {"keep_checkpoints": 9, "checkpoint_format": form}
    assert train.main(argv(dataset, out, **settings)) == code
    output = capsys.readouterr()
    for step in failing:
        is_fatal = step in (0, 12)
        place, other = (output.err, output.out) if is_fatal else (output.out, output.err)
        message = f"step-{step:08d} could not be written: no space left in"
        assert message in place
        assert message not in other
    root = out / "checkpoints"
    assert [int(path.name.removeprefix("step-")) for path in candidates(root)] == kept
    assert not list(root.glob("*.tmp"))
    assert len(metrics(out, "train")) == trained


def test_an_error_of_another_kind_is_not_lost(dataset, tmp_path, monkeypatch):
    fail_to_publish(monkeypatch, {4}, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        train.main(argv(dataset, tmp_path / "run"))
    assert metrics(tmp_path / "run", "train")[-1]["step"] == 8  # at the next save


def test_an_error_is_reported_if_the_run_ends_otherwise(dataset, tmp_path, monkeypatch, capsys):
    """The data is lost at step 7, whose checkpoint is complete before the run ends."""
    fail_to_publish(monkeypatch, {7}, OSError(5, "Input/output error"))
    lose_the_data(monkeypatch, 7)
    assert train.main(argv(dataset, tmp_path / "run")) == 1
    output = capsys.readouterr()
    assert "WARNING: checkpoint" in output.out
    assert "step-00000007 could not be written: [Errno 5]" in output.out
    assert "the data is gone" in output.err


def lose_the_data(patch, step) -> None:
    """Let the reading of the data fail at this step."""
    next_step, calls = train.next_step, []

    def lost(batches):
        calls.append(1)
        if len(calls) == step + 1:
            raise DataError("the data is gone")
        return next_step(batches)

    patch.setattr(train, "next_step", lost)


def test_the_save_after_lost_data_is_complete_before_the_run_ends(dataset, tmp_path, monkeypatch):
    """Otherwise, the other processes would end, and torchrun would kill the one that writes."""
    started, start = [], background.CheckpointWriter.start

    def starting(self):
        started.append(self._state.step)
        start(self)

    monkeypatch.setattr(background.CheckpointWriter, "start", starting)
    lose_the_data(monkeypatch, 7)
    assert train.main(argv(dataset, tmp_path / "run")) == 1
    assert started == [4]
    assert candidates(tmp_path / "run/checkpoints")[0].name == "step-00000007"


def test_a_signal_during_a_save_takes_effect_at_the_next_step(dataset, tmp_path, monkeypatch):
    """The last save must not be the one in the background that the signal interrupted."""
    fail_to_publish(monkeypatch, {4}, OSError(5, "Input/output error"))
    start = background.CheckpointWriter.start

    def starting(self):
        os.kill(os.getpid(), signal.SIGTERM)
        start(self)

    monkeypatch.setattr(background.CheckpointWriter, "start", starting)
    assert train.main(argv(dataset, tmp_path / "run")) == 128 + signal.SIGTERM
    assert candidates(tmp_path / "run/checkpoints")[0].name == "step-00000005"


def test_a_failed_write_does_not_keep_the_copy_of_the_state():
    class Copy:
        pass

    def write(copy):
        raise CheckpointError("no space left")

    copy = Copy()
    alive, failing = weakref.ref(copy), partial(write, copy)
    del copy
    gc.disable()  # a cycle would stay
    try:
        assert background._problem(failing) == "no space left"
        del failing
        assert alive() is None
    finally:
        gc.enable()


def test_too_little_memory_for_the_copy_names_the_setting(dataset, tmp_path, monkeypatch, capsys):
    def no_memory(tensor):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(background, "_copy_to_cpu", no_memory)
    assert train.main(argv(dataset, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert "async_save=false saves without a copy" in error
    assert "micro_batch_size" not in error


def test_saves_closer_together_than_a_write_takes_wait_for_each_other(
    dataset, tmp_path, monkeypatch, capsys
):
    publish, active, largest = write.publish, 0, 0

    def slow(partial, final):
        nonlocal active, largest
        active += 1
        largest = max(largest, active)
        time.sleep(0.05)
        publish(partial, final)
        active -= 1

    monkeypatch.setattr(write, "publish", slow)
    monkeypatch.setattr(saving, "NOTABLE_WAIT_S", 0.0)
    out = tmp_path / "run"
    assert train.main(argv(dataset, out, save_every=1, keep_checkpoints=99)) == 0
    assert largest == 1
    assert len(candidates(out / "checkpoints")) == 13
    assert re.search(r"step 2: waited \d+\.\d s", capsys.readouterr().out)
    assert (out / "checkpoints/latest").read_text() == "step-00000012\n"


def test_old_checkpoints_are_removed_and_no_thread_is_left(dataset, tmp_path):
    before = {*threading.enumerate()}
    for name in ("one", "two"):
        out = tmp_path / name
        assert train.main(argv(dataset, out, save_every=2, keep_checkpoints=2)) == 0
        assert [path.name for path in candidates(out / "checkpoints")] == [
            "step-00000012",
            "step-00000010",
        ]
    left = {*threading.enumerate()} - before
    assert not [thread for thread in left if thread.name.startswith("checkpoint")]


def test_a_run_resumed_from_an_earlier_step_abandons_the_later_ones(dataset, tmp_path):
    out = tmp_path / "run"
    assert train.main(argv(dataset, out, keep_checkpoints=9)) == 0
    start = out / "checkpoints/step-00000004"
    assert train.main(argv(dataset, out, keep_checkpoints=9, resume=start, save_every=3)) == 0
    names = sorted(path.name for path in (out / "checkpoints").glob("*step-*"))
    steps = [0, 4, 6, 9, 12]
    abandoned = [f"abandoned-step-{step:08d}" for step in (8, 12)]
    assert names == [*abandoned, *(f"step-{step:08d}" for step in steps)]


def test_without_async_save_nothing_is_written_in_the_background(dataset, tmp_path):
    with delayed_writes(3) as delayed:
        assert train.main(argv(dataset, tmp_path / "run", async_save=False)) == 0
    assert not delayed
    assert len(candidates(tmp_path / "run/checkpoints")) == 2


def test_a_signal_during_a_write_lets_it_complete_and_saves_the_step(
    dataset, tmp_path, monkeypatch
):
    """The signal arrives in step 5, while the checkpoint of step 4 cannot be completed yet."""
    publish, has_signal, events = write.publish, threading.Event(), []
    count_step = train.TrainState.count_step

    def waiting(partial, final):
        if final.name == "step-00000004":
            assert has_signal.wait(60)
        publish(partial, final)
        events.append(final.name)

    def counting(self, is_finite):
        count_step(self, is_finite)
        if self.step == 5:
            events.append("signal")
            os.kill(os.getpid(), signal.SIGTERM)
            has_signal.set()

    monkeypatch.setattr(write, "publish", waiting)
    monkeypatch.setattr(train.TrainState, "count_step", counting)
    assert train.main(argv(dataset, tmp_path / "run")) == 128 + signal.SIGTERM
    assert events == ["step-00000000", "signal", "step-00000004", "step-00000005"]


BLOCKED = """
import sys, threading, time
from pathlib import Path
import train
from trainer.checkpoint import write

publish = write.publish

def blocked(partial, final):
    if final.name == "step-00000004":
        Path(sys.argv[1]).touch()
        time.sleep(600)
    publish(partial, final)

write.publish = blocked
train.main(sys.argv[2:])
"""


@pytest.mark.parametrize("form", ["full", pytest.param("sharded", marks=pytest.mark.slow)])
def test_a_kill_during_a_write_leaves_the_previous_checkpoint(dataset, tmp_path, form):
    out, marker = tmp_path / "run", tmp_path / "marker"
    settings = argv(dataset, out, checkpoint_format=form, save_every=4, max_steps=12)
    command = [sys.executable, "-c", BLOCKED, str(marker), *settings]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not (marker.exists() and metrics(out, "train")[-1]["step"] > 4):
            assert process.poll() is None
            assert time.monotonic() < deadline, "waited for five minutes"
            time.sleep(0.01)
        process.kill()
    root = out / "checkpoints"
    found = newest_good(root, pytest.fail)
    assert found is not None
    assert found.step == 0
    assert [path.name for path in root.glob("*.tmp")] == ["step-00000004.tmp"]
    assert train.main(settings) == 0
    assert train.main(argv(dataset, tmp_path / "whole", checkpoint_format=form)) == 0
    found, wanted = (
        sharded.read_all(load_checkpoint(each / "checkpoints/step-00000012").model)
        for each in (out, tmp_path / "whole")
    )
    assert all((found[key] == wanted[key]).all() for key in wanted)
    assert not list(root.glob("*.tmp"))
