"""What happens to one process happens to all, and the one where it began is named."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

import train
from data.shards import DataError
from tests.distributed.runs import SETTINGS, main, trained
from tests.tiny import argv, metrics, weights
from trainer import signals as stopping
from trainer.checkpoint.read import candidates, load_checkpoint, open_checkpoint
from trainer.parallel import Parallel

pytestmark = pytest.mark.xdist_group("gang")  # one gang of processes for all of them

ROOT = Path(__file__).parents[2]
RUN = {"lr": 3e-3, "max_steps": 8, "dopr": "true", "eval_every": 3, "save_every": 3}
PLACES = {  # what is going on when the signal comes, and at which call
    "a step": (train.TrainState, "count_step", 5),
    "validation": (train, "evaluate", 2),
    "a save": (train.TrainState, "save", 2),
    "the wait for data": (train, "next_step", 5),
}


def signalled(place: str, signum: int, victim: int, arguments: list[str]) -> tuple[int, str]:
    """A run in which the process of rank `victim` alone gets a signal."""
    owner, name, at = PLACES[place]
    function, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == at and os.environ["RANK"] == str(victim):
            os.kill(os.getpid(), signum)
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counted)
        return main(arguments)


@pytest.fixture(scope="module")
def undisturbed(gang, dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return trained(gang, 3, dataset, folder, **RUN, parallel="fsdp")


@pytest.mark.parametrize(
    "place",
    [
        *("a step", "validation"),
        pytest.param("a save", marks=pytest.mark.slow),
        pytest.param("the wait for data", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_process_stops_all_at_one_step(gang, dataset, tmp_path, undisturbed, place):
    """Fault 13; a scheduler's signal may reach the workers, and again through torchrun."""
    out = tmp_path / "run"
    arguments = argv(dataset, out, **SETTINGS | RUN, parallel="fsdp")
    results = gang.run(3, signalled, place, signal.SIGTERM, 1, arguments)
    assert [code for code, _ in results] == [128 + signal.SIGTERM] * 3
    assert 0 < open_checkpoint(out).step < 8
    assert metrics(out, "run")[-1]["reason"] == "stopped by SIGTERM"
    trained(gang, 3, dataset, out, **RUN, parallel="fsdp")
    assert weights(out, 8) == weights(undisturbed, 8)
    losses = [[row["loss"] for row in metrics(each, "train")] for each in (out, undisturbed)]
    assert losses[0] == losses[1]


def test_a_repeated_signal_is_one_and_a_later_one_is_an_order(monkeypatch):
    exits = []
    monkeypatch.setattr(os, "_exit", exits.append)
    with stopping.StopRequest(all_reduce_flag=lambda signum: signum) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not stop  # until all have agreed
        assert stop.poll()
        assert not exits
        monkeypatch.setattr(stopping, "REPEAT_S", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
    assert exits == [128 + signal.SIGTERM]


def poisoned(what: str, victim: int, arguments: list[str]) -> tuple[int, str]:
    """A run in which the third step of one process has a loss or gradient that is not finite."""
    forward, calls = train.GPT.forward, 0

    def broken(self, idx, targets=None, **_):
        nonlocal calls
        logits, loss = forward(self, idx, targets)
        calls += self.training
        if self.training and calls == 9 and os.environ["RANK"] == str(victim):
            zero = (logits.sum() * 0).sqrt()  # whose gradient is not finite
            loss = loss + (zero if what == "gradient" else zero.detach() * torch.nan)
        return logits, loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.GPT, "forward", broken)
        return main(arguments)


@pytest.mark.parametrize(
    ("what", "parallel"),
    [
        *(("loss", "fsdp"), ("gradient", "ddp")),
        pytest.param("loss", "ddp", marks=pytest.mark.slow),
        pytest.param("gradient", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_all(
    gang, dataset, tmp_path, what, parallel
):
    """Fault 16."""
    out = tmp_path / "run"
    settings = RUN | {"max_steps": 3, "save_every": 1, "keep_checkpoints": 9, "optimizer": "muon"}
    arguments = argv(dataset, out, **SETTINGS | settings, parallel=parallel)
    assert gang.run(3, poisoned, what, 2, arguments) == [(0, "")] * 3
    before, after = (load_checkpoint(path) for path in candidates(out / "checkpoints")[1::-1])
    assert (before.step, after.step) == (2, 3)
    torch.testing.assert_close(after.model, before.model, rtol=0, atol=0)
    for kind in ("optimizers", "dopr"):
        torch.testing.assert_close(after.train[kind], before.train[kind], rtol=0, atol=0)
    assert metrics(out, "train")[-1]["skipped"] == 1


def failing(how: str, victim: int, arguments: list[str]) -> tuple[int | None, str]:
    """A run in which one process raises, or hangs for longer than the others wait."""
    count_step = train.TrainState.count_step

    def counting(self, is_finite):
        count_step(self, is_finite)
        if self.step == 4 and os.environ["RANK"] == str(victim):
            if how == "raises":
                raise KeyError("a bug")
            time.sleep(25)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.TrainState, "count_step", counting)
        try:
            return main(arguments)
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("raises", "rank 1 failed: KeyError: 'a bug'"),
        pytest.param("hangs", "rank 1 ended or hangs", marks=pytest.mark.slow),
    ],
)
def test_those_that_lose_a_process_end_and_name_it(gang, dataset, tmp_path, how, cause):
    """Fault 15. A process that hangs is torchrun's to kill, once the first of the others ended."""
    arguments = argv(dataset, tmp_path / "run", **SETTINGS | RUN, timeout_s=10)
    started = time.monotonic()
    results = gang.run(3, failing, how, 1, arguments)
    assert time.monotonic() - started < 60
    for rank in (0, 2):
        code, errors = results[rank]
        assert code == 1
        assert f"error on rank {rank}: {cause}" in errors
    trained(gang, 3, dataset, tmp_path / "run", **RUN)  # a relaunch resumes


def without_a_shard(victim: int, arguments: list[str]) -> tuple[int, str]:
    """A run in which the data of one process end before the fourth step."""
    next_step, steps = train.next_step, 0

    def counting(batches):
        nonlocal steps
        steps += 1
        if steps == 4 and os.environ["RANK"] == str(victim):
            raise DataError("shard 7 vanished")
        return next_step(batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "next_step", counting)
        return main(arguments)


def test_data_that_one_process_lacks_end_the_run_in_all_with_a_checkpoint(gang, dataset, tmp_path):
    """Fault 22."""
    out = tmp_path / "run"
    arguments = argv(dataset, out, **SETTINGS | RUN | {"save_every": 99, "timeout_s": 20})
    results = gang.run(3, without_a_shard, 1, arguments)
    assert [code for code, _ in results] == [1] * 3
    assert "error on rank 1: shard 7 vanished" in results[1][1]
    assert all("rank 1: shard 7 vanished" in results[rank][1] for rank in (0, 2))
    assert open_checkpoint(out).step == 3


def with_own_settings(arguments: list[str]) -> tuple[int, str]:
    rank = os.environ["RANK"]
    return main([*arguments, f"--seed={rank}", f"--gamma=0.{rank}"])


def test_processes_with_different_settings_refuse_to_train(gang, dataset, tmp_path):
    """The weights of FSDP would be pieced together from models of several seeds."""
    arguments = argv(dataset, tmp_path / "run", **SETTINGS | RUN, parallel="fsdp")
    for code, errors in gang.run(3, with_own_settings, arguments):
        assert code == 1
        assert "the processes differ, by rank, in seed: 0, 1, 2; gamma: 0.0, 0.1, 0.2." in errors


def test_a_store_that_is_gone_does_not_hide_what_went_wrong(monkeypatch):
    def gone(*args):
        raise distributed.DistNetworkError("Broken pipe")

    monkeypatch.setenv("WORLD_SIZE", "2")
    parallel = Parallel(torch.device("cpu"))
    parallel._store = SimpleNamespace(set=gone)
    assert not parallel.__exit__(KeyError, KeyError("a bug"), None)  # which goes on being raised


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
    """The processes that torchrun started, in order of rank."""
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
