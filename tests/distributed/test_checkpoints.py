"""A checkpoint can be resumed by any number of processes, in either format."""

import io
import json
import os
import pickle
from contextlib import redirect_stdout
from functools import cache
from itertools import product

import pytest
import torch
from torch import nn

from eval.convert import main as convert
from tests.distributed.runs import SETTINGS, distance, main, run, trained
from tests.tiny import argv, metrics
from tests.trainer.delayed_writes import delayed_writes
from tests.trainer.tiny_checkpoint import FILES
from trainer.checkpoint import sharded
from trainer.checkpoint.read import (
    CheckpointError,
    load_checkpoint,
    open_checkpoint,
)
from trainer.checkpoint.resume import find_checkpoint
from trainer.checkpoint.write import save_sharded
from trainer.parallel import Parallel

pytestmark = pytest.mark.xdist_group("gang")  # the tests share a gang of processes

TOLERANCE = 1e-5  # for fp32 sums in another order
MUON = {"optimizer": "muon", "lr": 3e-3, "dopr": "true", "refresh_every": 2, "sigma_beta": 0.9}
MUON |= {"ema_decay": 0.5, "max_steps": 8, "save_every": 5, "keep_checkpoints": 9}
WRITERS = {
    "ddp": (4, {"parallel": "ddp"}),
    "fsdp": (4, {"parallel": "fsdp"}),
    "hsdp-sharded": (4, {"parallel": "hsdp", "shard_size": 2, "checkpoint_format": "sharded"}),
}
READERS = {"ddp": {}, "fsdp": {"parallel": "fsdp", "checkpoint_format": "sharded"}}


@pytest.fixture(scope="module")
def written(gang, dataset, tmp_path_factory):
    """Return a function that gives a run of 8 steps by four processes, saved also at step 5."""

    @cache
    def run(writer):
        size, how = WRITERS[writer]
        folder = tmp_path_factory.mktemp("written") / "run"
        return trained(gang, size, dataset, folder, **MUON, **how)

    return run


ALL = list(product(WRITERS, [(1, "ddp"), (2, "ddp"), (3, "fsdp")]))
QUICK = [("fsdp", (1, "ddp")), ("hsdp-sharded", (2, "ddp"))]
CASES = [
    pytest.param(writer, *reader, marks=[] if (writer, reader) in QUICK else [pytest.mark.slow])
    for writer, reader in ALL
]


@pytest.mark.parametrize(("writer", "size", "reader"), CASES)
def test_what_four_processes_saved_any_number_continues(
    gang, dataset, tmp_path, written, writer, size, reader
):
    start = written(writer) / "checkpoints/step-00000005"
    settings = MUON | READERS[reader] | {"resume": start}
    out = trained(gang, size, dataset, tmp_path / "run", **settings)
    assert metrics(out, "train")[0]["step"] == 6
    for kind in ("model", "ema"):
        found, expected = (full_weights(each, kind) for each in (out, written(writer)))
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=TOLERANCE, rtol=0)


def full_weights(out, kind):
    """Return the newest weights of a run in either format."""
    return sharded.read_all(getattr(open_checkpoint(out), kind))


def test_the_formats_hold_the_same(written, tmp_path, capsys):
    """Converting full -> sharded -> full gives the same tensors."""
    convert([str(written("fsdp")), str(tmp_path / "shards"), "--to", "sharded"])
    convert([str(tmp_path / "shards"), str(tmp_path / "full"), "--to", "full"])
    before, after = open_checkpoint(written("fsdp")), open_checkpoint(tmp_path / "full")
    for kind in ("model", "ema", "train"):
        found, expected = getattr(after, kind), getattr(before, kind)
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
    differing = {"files", "format"}
    facts = [
        {key: value for key, value in each.manifest.items() if key not in differing}
        for each in (before, after)
    ]
    assert facts[0] == facts[1]
    assert "step 8" in capsys.readouterr().out


def test_shards_become_a_hugging_face_folder(written, tmp_path):
    convert([str(written("hsdp-sharded")), str(tmp_path / "hf"), "--to", "hf"])
    assert json.loads((tmp_path / "hf/config.json").read_text())["n_embd"] == SETTINGS["n_embd"]


def test_damage_to_a_shard_is_found(written, tmp_path, capsys):
    convert([str(written("fsdp")), str(tmp_path / "run"), "--to", "sharded"])
    folder = tmp_path / "run/checkpoints/step-00000008"
    shard = folder / "shards/__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp does not match its sha256"):
        open_checkpoint(folder)


def with_a_full_disk(arguments):
    """Start a run in which the process of rank 1 cannot write its tensors."""
    save = torch.save

    def disk_full(*args, **kwargs):
        if os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", disk_full)
        return main(arguments)


def test_a_sharded_checkpoint_fails_if_one_process_cannot_write(gang, dataset, tmp_path):
    """The first save fails, so the run ends in every process before it trains."""
    how = {"max_steps": 4, "save_every": 2, "parallel": "fsdp", "checkpoint_format": "sharded"}
    arguments = argv(dataset, tmp_path / "run", **SETTINGS | how)
    for code, errors in gang.run(2, with_a_full_disk, arguments):
        assert code == 1
        assert "step-00000000 could not be written: no space left in" in errors
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == []


def with_delayed_writes(arguments):
    """Start a run that trains on for two steps before a write in the background starts."""
    with delayed_writes(2) as delayed:
        return *main(arguments), delayed


BACKGROUND = {
    "ddp": (2, {"parallel": "ddp"}),
    "fsdp": (3, {"parallel": "fsdp"}),
    "hsdp with a copy in every process": (2, {"parallel": "hsdp", "shard_size": 1}),
    "sharded ddp": (2, {"parallel": "ddp", "checkpoint_format": "sharded"}),
    "sharded fsdp": (3, {"parallel": "fsdp", "checkpoint_format": "sharded"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKGROUND)
def test_a_write_while_training_goes_on_holds_the_state_of_its_step(gang, dataset, tmp_path, name):
    size, how = BACKGROUND[name]
    settings = SETTINGS | MUON | how | {"save_every": 3}
    trained(gang, size, dataset, tmp_path / "sync", **settings, async_save=False)
    arguments = argv(dataset, tmp_path / "async", **settings)
    assert gang.run(size, with_delayed_writes, arguments) == [(0, "", [5, 8])] * size
    for step in (3, 6):
        found, wanted = (
            load_checkpoint(tmp_path / each / f"checkpoints/step-{step:08d}")
            for each in ("async", "sync")
        )
        for kind in ("model", "ema", "train"):
            pair = [sharded.read_all(getattr(each, kind)) for each in (found, wanted)]
            torch.testing.assert_close(*pair, atol=0, rtol=0)


def with_a_disk_that_becomes_full(arguments):
    """Start a run in which the process of rank 1 cannot write its tensors after the first save."""
    write, calls = sharded.write, 0

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 1 or os.environ["RANK"] != "1":
            return write(*args, **kwargs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "save", disk_full)
            return write(*args, **kwargs)

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as output:
        patch.setattr(sharded, "write", failing)
        return *main(arguments), output.getvalue()


def test_only_the_last_failure_of_a_later_save_ends_the_run(gang, dataset, tmp_path):
    how = {"max_steps": 6, "save_every": 2, "parallel": "fsdp", "checkpoint_format": "sharded"}
    arguments = argv(dataset, tmp_path / "run", **SETTINGS | how)
    results = gang.run(2, with_a_disk_that_becomes_full, arguments)
    for code, errors, _ in results:
        assert code == 1
        assert "step-00000006 could not be written: no space left in" in errors
    for step in (2, 4):
        assert f"step-{step:08d} could not be written: no space left in" in results[0][2]
    assert open_checkpoint(tmp_path / "run").step == 0
    assert metrics(tmp_path / "run", "train")[-1]["step"] == 6


def save_to_folders_of_their_own(folder):
    with Parallel(torch.device("cpu"), mode="fsdp", timeout_s=60) as parallel:
        model = nn.Linear(4, 6)
        parallel.place(model)
        with pytest.raises(CheckpointError) as caught:
            save_sharded(
                folder / str(parallel.rank), 1, parallel, model=model.state_dict(), **FILES
            )
    return str(caught.value)


def test_a_sharded_checkpoint_fails_if_the_processes_do_not_share_the_folder(gang, tmp_path):
    for message in gang.run(2, save_to_folders_of_their_own, tmp_path):
        assert "__1_0.distcp of other processes is not in" in message
        assert "out_dir must be a folder that all processes share" in message
    assert not list(tmp_path.glob("*/step-00000001"))


class CodeInPickle:
    def __reduce__(self):
        return print, ("code ran",)


def test_an_index_that_runs_code_is_refused(tmp_path, capsys):
    tree = sharded.write(tmp_path, {"w": torch.ones(2)}, is_alone=True)
    for index in (
        pickle.dumps(CodeInPickle()),
        b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.getcwd\x93)R.",
    ):
        (tmp_path / sharded.INDEX).write_bytes(index)
        with pytest.raises(ValueError, match="refused"):
            sharded.stored(tmp_path, tree)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_another_number_of_processes_sees_the_same_tokens_and_losses(gang, dataset, tmp_path, size):
    """Compare runs that change from 1 to 2 or from 2 to 1 processes with runs that do not."""
    settings = {"lr": 3e-3, "max_steps": 8, "save_every": 4, "keep_checkpoints": 9}
    steady = trained(gang, size, dataset, tmp_path / "steady", **settings)
    start = steady / "checkpoints/step-00000004"
    changed = trained(gang, 3 - size, dataset, tmp_path / "run", **settings, resume=start)
    losses = [row["loss"] for row in metrics(steady, "train")[4:]]
    assert [row["loss"] for row in metrics(changed, "train")] == pytest.approx(losses, abs=1e-6)
    assert distance(steady, changed) < TOLERANCE


def find_in_folders_of_their_own(data, folder):
    """Look for a checkpoint in out_dirs that differ between the processes."""
    import train

    rank = os.environ["RANK"]
    config, _ = train.load_config(argv(data, folder / rank, **SETTINGS))
    with Parallel(torch.device("cpu"), timeout_s=60) as parallel:
        try:
            find_checkpoint(config, train.open_data(str(data)), parallel)
        except CheckpointError as error:
            return str(error)


def test_processes_that_see_different_checkpoints_refuse_to_resume(gang, dataset, tmp_path):
    trained(gang, 1, dataset, tmp_path / "0", lr=3e-3, max_steps=3)
    trained(gang, 1, dataset, tmp_path / "1", lr=3e-3, max_steps=4)
    for message in gang.run(2, find_in_folders_of_their_own, dataset, tmp_path):
        assert "see different checkpoints" in message
        assert "step-00000003" in message
        assert "step-00000004" in message


def test_a_batch_that_the_processes_cannot_share_is_refused(gang, dataset, tmp_path):
    for code, errors in run(gang, 4, dataset, tmp_path / "run", batch_size=6, max_steps=2):
        assert code == 1
        assert "batch_size=6: must be divisible by the number of processes" in errors
