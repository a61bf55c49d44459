"""Test studies that are stopped or in which a run fails."""

import os
import signal
import subprocess
import sys

import pytest

from studies.sweep.compare import main
from tests.studies.records import read_lines
from tests.studies.sweep.test_study import ROOT, TINY
from tests.waiting import PATIENCE, wait_until


def add_other_run(folder, name):
    """Write the record of a run with other settings."""
    (folder / "runs" / name).mkdir(parents=True)
    (folder / "runs" / name / "record.json").write_text('{"asked": {}}')


@pytest.mark.usefixtures("synchronous")
def test_finished_runs_are_written_if_a_run_fails(tmp_path):
    add_other_run(tmp_path, "muon-lr0.016-seed1")
    with pytest.raises(SystemExit, match="2"):
        main(["--task", "lds", "--steps", "9", "--optimizers", "muon", "--out", str(tmp_path)])
    runs = [(row["lr"], row["seed"]) for row in read_lines(tmp_path / "records.jsonl")]
    assert runs[:2] == [(0.008, 0), (0.008, 1)]


def test_a_failed_run_ends_the_runs_of_the_other_optimizers(tmp_path):
    add_other_run(tmp_path, "muon-lr0.008-seed0")
    command = ["--task", "lds", "--steps", "20000", "--tuning_seeds", "1", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        main([*command, "--optimizers", "muon,adamw"])  # a run of adamw takes many seconds
    assert not [*tmp_path.glob("runs/adamw*/record.json")]


@pytest.fixture
def interruptible():
    """Let child processes react to SIGINT even if a background shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_study_leaves_no_process_behind(tmp_path, signum, code):
    command = ["--task", TINY, "--steps", "1000000", "--optimizers", "adamw,sgd"]
    started = subprocess.Popen(
        [sys.executable, "-m", "studies.sweep.compare", *command, "--out", tmp_path],
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: len([*tmp_path.glob("runs/*/metrics.jsonl")]) == 2)
        started.send_signal(signum)  # to the parent alone
        assert started.wait(timeout=PATIENCE) == code
        wait_until(lambda: not alive(started.pid))
    finally:
        if alive(started.pid):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
