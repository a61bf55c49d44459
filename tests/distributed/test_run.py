"""Validation, rollouts and records of a run with several processes."""

import os
import time

import pytest
import torch

from tests.distributed.runs import trained
from tests.tiny import metrics, weights
from trainer.parallel import Parallel

pytestmark = pytest.mark.xdist_group("gang")  # the tests share a gang of processes

PDFA = "task:pdfa,states=4,alphabet=4,horizon=16,n_documents=64"
RUN = {"lr": 3e-3, "max_steps": 4, "dopr": "true"}


@pytest.mark.parametrize(
    ("size", "parallel"), [pytest.param(2, "ddp", marks=pytest.mark.slow), (3, "fsdp")]
)
def test_rollouts_are_graded_as_in_one_process(gang, tmp_path, size, parallel):
    """The episodes are divided among the processes; 8 do not divide evenly among 3."""
    settings = RUN | {"ttf_every": 2, "ttf_episodes": 8}
    alone = trained(gang, 1, PDFA, tmp_path / "alone", **settings)
    out = trained(gang, size, PDFA, tmp_path / "run", **settings, parallel=parallel)
    rows, expected = metrics(out, "ttf"), metrics(alone, "ttf")
    assert len(rows) == len(expected) == 3
    for ours, theirs in zip(rows, expected, strict=True):
        assert ours.keys() == theirs.keys()
        numbers = {key: value for key, value in theirs.items() if key != "kind"}
        assert {key: ours[key] for key in numbers} == pytest.approx(numbers, rel=1e-3)


def test_validation_between_steps_changes_nothing_and_one_process_writes(gang, dataset, tmp_path):
    settings = RUN | {"max_steps": 2, "parallel": "fsdp"}
    often = trained(gang, 2, dataset, tmp_path / "often", **settings, eval_every=1)
    never = trained(gang, 2, dataset, tmp_path / "never", **settings, eval_every=99)
    assert weights(often, 2) == weights(never, 2)
    assert [row["step"] for row in metrics(often, "val")] == [0, 1, 2]
    assert [row["step"] for row in metrics(often, "train")] == [1, 2]
    starts = [row for row in metrics(often, "run") if row["event"] == "start"]
    assert [row["world"] for row in starts] == [2]


def test_validation_covers_every_token_once_whatever_the_number_of_processes(
    gang, dataset, tmp_path
):
    settings = RUN | {"max_steps": 1, "warmup_steps": 0, "eval_batches": 0}
    rows = [
        metrics(trained(gang, size, dataset, tmp_path / str(size), **settings), "val")
        for size in (1, 2, 4)
    ]
    assert {row["n_tokens"] for val in rows for row in val} == {599}
    for val in rows[1:]:
        losses = [row["loss"] for row in rows[0]]
        assert [row["loss"] for row in val] == pytest.approx(losses, abs=1e-6)


def slowly_prepared(path):
    """Let the first process write a file after a while, and all processes read it."""

    def prepared():
        if os.environ["RANK"] == "0":
            time.sleep(0.5)
            path.write_text("data")
        return path.read_text()

    with Parallel(torch.device("cpu"), timeout_s=60) as parallel:
        return parallel.main_process_first(prepared)


def test_the_others_wait_for_what_the_first_process_prepares(gang, tmp_path):
    assert gang.run(3, slowly_prepared, tmp_path / "prepared") == ["data"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_compile_bf16_and_averaged_weights_train(gang, dataset, tmp_path, parallel):
    settings = RUN | {"compile": "true", "dtype": "bfloat16", "ema_decay": 0.5, "n_layer": 1}
    out = trained(gang, 2, dataset, tmp_path / "run", **settings, parallel=parallel)
    val = metrics(out, "val")
    assert val[-1]["loss"] < val[0]["loss"]
    assert "ema_loss" in val[-1]
