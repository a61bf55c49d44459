"""A signal or failure in one process stops all, and the message names that process."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

import train
from data.shards import DataError
from eval import in_training
from model import GPT
from tests.distributed.runs import SETTINGS, main, trained
from tests.tiny import argv, metrics, weights
from trainer import failures, signals
from trainer.checkpoint.read import candidates, load_checkpoint, open_checkpoint
from trainer.parallel import Parallel

pytestmark = pytest.mark.xdist_group("gang")  # the tests share a gang of processes

RUN = {"lr": 3e-3, "max_steps": 8, "dopr": "true", "eval_every": 3, "save_every": 3}
PLACES = {  # the function in which the signal arrives, and at which call
    "a step": (train.TrainState, "count_step", 5),
    "validation": (in_training, "evaluate", 2),
    "a save": (train.TrainState, "to_dict", 2),
    "the wait for data": (train, "next_step", 5),
}


def signalled(place: str, signum: int, victim: int, arguments: list[str]) -> tuple[int, str]:
    """Start a run in which only the process of rank `victim` gets a signal."""
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
        "a step",
        pytest.param("validation", marks=pytest.mark.slow),
        pytest.param("a save", marks=pytest.mark.slow),
        pytest.param("the wait for data", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_process_stops_all_at_one_step(gang, dataset, tmp_path, undisturbed, place):
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


def test_a_signal_repeated_at_once_is_ignored_and_a_later_one_ends_the_process(monkeypatch):
    exits = []
    monkeypatch.setattr(os, "_exit", exits.append)
    with signals.StopRequest(start_max=lambda signum: lambda: signum) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not stop.poll()  # until all processes have polled twice
        assert stop.poll()
        assert not exits
        monkeypatch.setattr(signals, "REPEAT_S", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
    assert exits == [128 + signal.SIGTERM]


def poisoned(what: str, victim: int, arguments: list[str]) -> tuple[int, str]:
    """Start a run in which one process has a non-finite loss or gradient at the third step."""
    forward, calls = GPT.forward, 0

    def broken(self, idx, targets=None, **options):
        nonlocal calls
        logits, loss = forward(self, idx, targets, **options | {"return_logits": True})
        calls += self.training
        if self.training and calls == 9 and os.environ["RANK"] == str(victim):
            zero = (logits.sum() * 0).sqrt()  # its gradient is not finite
            loss = loss + (zero if what == "gradient" else zero.detach() * torch.nan)
        return logits, loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "forward", broken)
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
    """Start a run in which one process raises, or hangs for longer than the others wait."""
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
def test_the_other_processes_end_and_name_the_one_that_failed(gang, dataset, tmp_path, how, cause):
    arguments = argv(dataset, tmp_path / "run", **SETTINGS | RUN, timeout_s=10)
    started = time.monotonic()
    results = gang.run(3, failing, how, 1, arguments)
    assert time.monotonic() - started < 60
    for rank in (0, 2):
        code, errors = results[rank]
        assert code == 1, errors
        assert f"error on rank {rank}: {cause}" in errors
    trained(gang, 3, dataset, tmp_path / "run", **RUN)  # the run can be resumed


def without_a_shard(victim: int, arguments: list[str]) -> tuple[int, str]:
    """Start a run in which one process loses its data before the fourth step."""
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


def test_lost_data_in_one_process_ends_the_run_in_all_with_a_checkpoint(gang, dataset, tmp_path):
    out = tmp_path / "run"
    arguments = argv(dataset, out, **SETTINGS | RUN | {"save_every": 99, "timeout_s": 20})
    results = gang.run(3, without_a_shard, 1, arguments)
    assert [code for code, _ in results] == [1] * 3
    assert "error on rank 1: shard 7 vanished" in results[1][1]
    assert all("rank 1: shard 7 vanished" in results[rank][1] for rank in (0, 2))
    assert open_checkpoint(out).step == 3


def with_own_settings(arguments: list[str]) -> tuple[int, str]:
    rank = os.environ["RANK"]
    return main([*arguments, f"--seed={rank}", f"--beta1=0.{rank}"])


def test_processes_with_different_settings_refuse_to_train(gang, dataset, tmp_path):
    """FSDP would otherwise combine the weights of models with different seeds."""
    arguments = argv(dataset, tmp_path / "run", **SETTINGS | RUN, parallel="fsdp")
    for code, errors in gang.run(3, with_own_settings, arguments):
        assert code == 1
        assert "the processes differ, by rank, in seed: 0, 1, 2; beta1: 0.0, 0.1, 0.2." in errors


def test_a_store_that_is_gone_does_not_hide_what_went_wrong(monkeypatch):
    def gone(*args):
        raise distributed.DistNetworkError("Broken pipe")

    monkeypatch.setenv("WORLD_SIZE", "2")
    parallel = Parallel(torch.device("cpu"))
    parallel._store = SimpleNamespace(set=gone)
    assert not parallel.__exit__(
        KeyError, KeyError("a bug"), None
    )  # the KeyError is not suppressed


def test_a_process_that_is_done_names_the_one_that_failed_after_all_work(monkeypatch):
    def lost():
        raise RuntimeError("Connection closed by peer")

    found = {"cause/1": b"KeyError: a bug"}
    store = SimpleNamespace(
        set=found.__setitem__, get=found.get, check=lambda keys: keys[0] in found
    )
    monkeypatch.setattr(distributed, "barrier", lost)
    monkeypatch.setattr(failures, "GRACE_S", 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    parallel = Parallel(torch.device("cpu"))
    parallel._store = store
    with pytest.raises(failures.ProcessLost, match="rank 1 failed: KeyError: a bug"):
        parallel.__exit__(None, None, None)
