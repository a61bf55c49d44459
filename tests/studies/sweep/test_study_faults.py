"""Studies of which a run fails, or that are stopped."""

import os
import signal
import subprocess
import sys
import time

import pytest

from studies.sweep.compare import main
from tests.studies.small_studies import read_records
from tests.studies.sweep.test_study import ROOT, TINY

HANGS = 300  # seconds after which a wait is given up; a busy machine is slow


def plant(folder, name):
    """A finished run that nobody asked for."""
    (folder / "runs" / name).mkdir(parents=True)
    (folder / "runs" / name / "record.json").write_text('{"asked": {}}')


def test_what_is_finished_is_written_when_a_run_fails(tmp_path):
    plant(tmp_path, "muon-lr0.016-seed1")
    with pytest.raises(SystemExit) as exit:
        main(["--task", "lds", "--steps", "9", "--optimizers", "muon", "--out", str(tmp_path)])
    assert exit.value.code == 2
    runs = [(row["lr"], row["seed"]) for row in read_records(tmp_path)]
    assert runs[:2] == [(0.008, 0), (0.008, 1)]


def test_a_failed_run_ends_those_of_the_other_optimizers(tmp_path):
    plant(tmp_path, "muon-lr0.008-seed0")
    command = ["--task", "lds", "--steps", "20000", "--tuning_seeds", "1", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        main([*command, "--optimizers", "muon,adamw"])  # a run of adamw takes many seconds
    assert not [*tmp_path.glob("runs/adamw*/record.json")]


@pytest.fixture
def interruptible():
    """Processes that start here heed SIGINT, also where a shell in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_study_leaves_no_process(tmp_path, signum, code):
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
        assert started.wait(timeout=HANGS) == code
        wait_until(lambda: not alive(started.pid))
    finally:
        if alive(started.pid):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def wait_until(holds):
    deadline = time.monotonic() + HANGS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
