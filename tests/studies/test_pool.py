"""Tests of the pool of processes in which studies run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from studies import pool
from studies.pool import map_in_pool, worker_pool
from tests.waiting import PATIENCE, wait_until

ROOT = Path(__file__).parents[2]
COMMAND = "from tests.studies.test_pool import wait_in_pool; import sys; wait_in_pool(sys.argv[1])"


def square(x):
    return x * x


def wait(file):
    """Write the number of this process, then wait for longer than a test may take."""
    Path(file).write_text(str(os.getpid()))
    time.sleep(10 * PATIENCE)


def wait_in_pool(file):
    map_in_pool(wait, [file], 1)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def written(file):
    return file.exists() and file.read_text()


def test_results_come_in_the_order_of_the_tasks():
    assert map_in_pool(square, [3, 1, 2], 2) == [9, 1, 4]


@pytest.mark.parametrize(
    "signum", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_the_workers_end_with_the_process_that_started_them(tmp_path, signum):
    file = tmp_path / "worker"
    started = subprocess.Popen([sys.executable, "-c", COMMAND, file], cwd=ROOT)
    wait_until(lambda: written(file))
    started.send_signal(signum)  # to the parent alone
    assert started.wait(timeout=PATIENCE) == -signum
    wait_until(lambda: not is_alive(int(file.read_text())))


def test_an_exception_ends_a_worker_in_the_middle_of_its_task(tmp_path):
    file = tmp_path / "worker"

    def fail():
        with worker_pool(1) as pool:
            pool.submit(wait, file)
            wait_until(lambda: written(file))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    wait_until(lambda: not is_alive(int(file.read_text())))


def test_without_tasks_nothing_starts_and_nothing_is_shown(capsys, monkeypatch):
    monkeypatch.setattr(pool, "worker_pool", None)
    assert map_in_pool(len, [], 2) == []
    assert capsys.readouterr().err == ""
