"""torchrun reports the process that failed, and a new launch resumes the run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.runs import SETTINGS
from tests.tiny import argv, metrics
from trainer.checkpoint.read import open_checkpoint

ROOT = Path(__file__).parents[2]
RUN = {"lr": 3e-3, "max_steps": 8, "dopr": "true", "eval_every": 3, "save_every": 3}


def torchrun(n: int, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    return subprocess.Popen(
        [*command, str(n), "train.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def workers(launcher: int) -> list[int]:
    """Return the ids of the processes that torchrun started, in order of rank."""
    found = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(pid) for pid in found if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_torchrun_ends_with_the_root_cause_and_resumes(dataset, tmp_path, signum):
    out = tmp_path / "run"
    endless = SETTINGS | RUN | {"max_steps": 100_000, "eval_every": 100_000}
    process = torchrun(2, *argv(dataset, out, **endless))
    deadline = time.monotonic() + 200
    while not (out / "checkpoints/latest").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(workers(process.pid)[1], signum)
    output, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    if signum == signal.SIGKILL:
        cause = output.partition("Root Cause")[2]
        assert "rank      : 1" in cause
        assert "-9" in cause
    else:
        assert metrics(out, "run")[-1]["reason"] == "stopped by SIGTERM"
    step = open_checkpoint(out).step
    done = torchrun(2, *argv(dataset, out, **endless | {"max_steps": step + 2}))
    assert "resumed" in done.communicate(timeout=200)[0]
    assert open_checkpoint(out).step == step + 2
