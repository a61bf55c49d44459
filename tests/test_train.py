"""A run learns, resumes bit for bit, and stops cleanly."""

import json
import math
import os
import signal
import weakref

import pytest
import torch

import train
from eval import in_training
from tests.devices import DEVICES
from tests.tiny import argv, metrics, weights
from trainer.checkpoint.read import open_checkpoint
from trainer.checkpoint.state import TrainState


def test_a_run_learns_and_writes_all_its_files(dataset, tmp_path):
    out = tmp_path / "run"
    assert train.main(argv(dataset, out, max_steps=40, warmup_steps=4, lr=1e-2)) == 0
    val = metrics(out, "val")
    assert [row["step"] for row in val] == [0, 6, 12, 18, 24, 30, 36, 40]
    assert val[0]["loss"] == pytest.approx(math.log(257), abs=0.1)  # before training
    assert val[-1]["loss"] < 2.5
    assert val[-1]["bits_per_byte"] == pytest.approx(
        val[-1]["loss"] / math.log(2)
    )  # one token per byte
    assert json.loads((out / "config.json").read_text())["max_steps"] == 40
    assert (out / "checkpoints/latest").read_text() == "step-00000040\n"
    assert [row["event"] for row in metrics(out, "run")] == ["start", "end"]
    expected = {"loss", "lr", "grad_norm", "tokens_per_s", "mfu", "step_ms", "skipped"}
    assert expected <= metrics(out, "train")[0].keys()


VARIANTS = {
    "adamw": {},
    "dropout-ema": {"dropout": 0.1, "ema_decay": 0.9},
    "sgd": {"optimizer": "sgd", "lr": 0.1},
    "signum": {"optimizer": "signum", "lr": 1e-3},
    "muon": {"optimizer": "muon"},
    "adamuon": {"optimizer": "adamuon"},
    "dopr-adamw-exact": {"dopr": True},
    "dopr-muon-fast": {"dopr": True, "optimizer": "muon", "sigma_beta": 0.9, "refresh_every": 3},
    "dopr-fresh-mean": {"dopr": True, "sigma_beta": 0.9, "refresh_every": 3, "fresh_mean": True},
}


SLOW = ("sgd", "signum", "muon", "adamuon")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] if x in SLOW else []) for x in VARIANTS]
)
def test_a_run_resumed_twice_equals_an_uninterrupted_one_bit_for_bit(dataset, tmp_path, name):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = VARIANTS[name] | {"save_every": 1, "keep_checkpoints": 99}
    assert train.main(argv(dataset, whole, **changes)) == 0
    for stop_after in (4, 8):  # not multiples of refresh_every
        with pytest.MonkeyPatch.context() as patch:
            request_stop_after(patch, stop_after)
            assert train.main(argv(dataset, parts, **changes)) == 128 + signal.SIGTERM
        assert (parts / "checkpoints/latest").read_text() == f"step-{stop_after:08d}\n"
    assert train.main(argv(dataset, parts, **changes)) == 0
    assert weights(parts, 12) == weights(whole, 12)
    assert losses(parts) == losses(whole)
    if "ema_decay" in changes:
        name = "checkpoints/step-00000012/ema.safetensors"
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("where", ["new", "old"])
def test_a_run_from_a_given_checkpoint_continues_by_the_same_command(
    dataset, tmp_path, capsys, where
):
    old, new = tmp_path / "old", tmp_path / where
    assert train.main(argv(dataset, old, keep_checkpoints=9)) == 0
    start = old / "checkpoints/step-00000004"
    assert train.main(argv(dataset, tmp_path / "whole", resume=start, lr=1e-3)) == 0
    command = argv(dataset, new, save_every=2, resume=start, lr=1e-3)
    capsys.readouterr()
    for stop_after, begin in ((5, start), (9, new / "checkpoints/step-00000005")):
        with pytest.MonkeyPatch.context() as patch:
            request_stop_after(patch, stop_after)
            assert train.main(command) == 128 + signal.SIGTERM
        assert f"resumed {begin} at" in capsys.readouterr().out
    assert train.main(command) == 0
    output = capsys.readouterr().out
    assert f"resume={start}: {new} already holds the run that started there" in output
    assert f"resumed {new / 'checkpoints/step-00000009'} at" in output
    assert weights(new, 12) == weights(tmp_path / "whole", 12)


def test_a_run_that_is_killed_before_its_first_save_starts_from_the_given_checkpoint_again(
    dataset, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "run"
    assert train.main(argv(dataset, out, keep_checkpoints=9)) == 0
    command = argv(dataset, out, save_every=5, resume=out / "checkpoints/step-00000004")
    with monkeypatch.context() as patch:
        patch.setattr(train.CheckpointSaver, "save", None)  # fails at the first save
        with pytest.raises(TypeError):
            train.main(command)
    assert train.main(command) == 0
    assert capsys.readouterr().out.count("step-00000004 at step 4") == 2


def test_a_checkpoint_of_another_run_is_also_written_to_the_new_out_dir(dataset, tmp_path):
    start = tmp_path / "old/checkpoints/step-00000012"
    assert train.main(argv(dataset, tmp_path / "old")) == 0
    assert train.main(argv(dataset, tmp_path / "new", resume=start)) == 0
    assert open_checkpoint(tmp_path / "new").step == 12
    assert weights(tmp_path / "new", 12) == weights(tmp_path / "old", 12)


def losses(out):
    """Return the logged training and validation losses with their steps."""
    train_rows = [(row["step"], row["loss"]) for row in metrics(out, "train")]
    return train_rows, [(row["step"], row["loss"]) for row in metrics(out, "val")]


def request_stop_after(patch, step):
    """Send SIGTERM after `step` optimizer steps."""
    count_step = train.TrainState.count_step

    def counting(self, is_finite):
        count_step(self, is_finite)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(train.TrainState, "count_step", counting)


@pytest.mark.parametrize("where", ["evaluate", "backward"])
def test_a_stop_inside_validation_or_a_step_loses_and_doubles_nothing(dataset, tmp_path, where):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = {"dropout": 0.1, "dopr": True, "refresh_every": 3}
    assert train.main(argv(dataset, whole, **changes)) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_inside(patch, where)
        assert train.main(argv(dataset, parts, **changes)) == 128 + signal.SIGINT
    assert train.main(argv(dataset, parts, **changes)) == 0
    assert weights(parts, 12) == weights(whole, 12)
    assert losses(parts) == losses(whole)


def stop_inside(patch, where):
    """Send SIGINT at the second validation, or before the first backward of the ninth step."""
    calls = 0
    owner, name = {
        "evaluate": (in_training, "evaluate"),
        "backward": (torch.Tensor, "backward"),
    }[where]
    call = getattr(owner, name)

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == {"evaluate": 2, "backward": 17}[where]:
            os.kill(os.getpid(), signal.SIGINT)
        return call(*args, **kwargs)

    patch.setattr(owner, name, counted)


def test_the_same_seed_gives_the_same_run_whatever_the_number_of_loader_workers(dataset, tmp_path):
    for workers in (0, 1, 2):
        assert train.main(argv(dataset, tmp_path / str(workers), loader_workers=workers)) == 0
    assert losses(tmp_path / "0") == losses(tmp_path / "1") == losses(tmp_path / "2")
    assert weights(tmp_path / "0", 12) == weights(tmp_path / "2", 12)


def test_another_seed_gives_another_run(dataset, tmp_path):
    for seed in (1, 2):
        assert train.main(argv(dataset, tmp_path / str(seed), seed=seed, max_steps=3)) == 0
    assert weights(tmp_path / "1", 3) != weights(tmp_path / "2", 3)


@pytest.mark.parametrize("dopr", [False, True])
def test_micro_batches_do_not_change_the_step(dataset, tmp_path, dopr):
    finals = []
    for size in (8, 4, 1):
        out = tmp_path / str(size)
        train.main(argv(dataset, out, micro_batch_size=size, dopr=dopr, eval_batches=0))
        finals.append(metrics(out, "val")[-1]["loss"])
    assert finals == pytest.approx([finals[0]] * 3, abs=1e-5)  # for fp32 sums in another order


def test_dropout_differs_from_step_to_step(dataset, tmp_path, monkeypatch):
    seeds = []
    seed = train.Parallel.seed
    monkeypatch.setattr(
        train.Parallel, "seed", lambda self, each: (seeds.append(each), seed(self, each))
    )
    train.main(argv(dataset, tmp_path / "run", max_steps=5))
    # the CPU generator uses only 32 bits of a seed
    assert len({each % 2**32 for each in seeds}) == 5


def test_the_gradients_are_freed_before_the_next_step(dataset, tmp_path, monkeypatch):
    norm, seen, alive = train.get_total_norm, [], []

    def spied(grads):
        alive.append(sum(grad() is not None for grad in seen))
        seen[:] = map(weakref.ref, grads)
        return norm(grads)

    monkeypatch.setattr(train, "get_total_norm", spied)
    train.main(argv(dataset, tmp_path / "run", max_steps=3, save_every=9))
    assert seen
    assert alive == [0, 0, 0]


def test_dropout_differs_between_processes():
    seeds = {train.random_seed(1337, step, rank) for step in range(100) for rank in range(-1, 64)}
    assert len(seeds) == 6500


def test_the_checkpoint_that_a_run_continues_from_does_not_stay_in_memory(
    dataset, tmp_path, monkeypatch
):
    train.main(argv(dataset, tmp_path / "run", max_steps=4))
    restore, read, alive = TrainState.restore, [], []

    def recorded(state, checkpoint):
        read.append(weakref.ref(checkpoint))
        restore(state, checkpoint)

    def check_and_stop(*_):
        alive.append(read[0]())
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainState, "restore", recorded)
    monkeypatch.setattr(TrainState, "count_step", check_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(argv(dataset, tmp_path / "run"))
    assert alive == [None]


def test_a_finished_run_is_not_trained_again(dataset, tmp_path):
    out = tmp_path / "run"
    train.main(argv(dataset, out))
    before = weights(out, 12), losses(out)
    assert train.main(argv(dataset, out)) == 0
    assert (weights(out, 12), losses(out)) == before


def test_the_averaged_weights_are_the_average(dataset, tmp_path):
    out = tmp_path / "run"
    changes = {"ema_decay": 0.5, "save_every": 1, "keep_checkpoints": 99, "max_steps": 4}
    train.main(argv(dataset, out, **changes))
    load = open_checkpoint
    steps = [load(out / f"checkpoints/step-{i:08d}").model for i in range(1, 5)]
    ema = load(out).ema
    for key, value in ema.items():
        average = steps[0][key]  # the first update copies the weights
        for later in steps[1:]:
            average = 0.5 * average + 0.5 * later[key]
        torch.testing.assert_close(value, average)


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_and_compile_train(dataset, tmp_path, device):
    out, changes = tmp_path / "run", {"dtype": "bfloat16", "compile": True, "dopr": True}
    changes |= {"n_layer": 1, "max_steps": 6}
    assert train.main(argv(dataset, out, device=device, **changes)) == 0
    val = metrics(out, "val")
    assert val[-1]["loss"] < val[0]["loss"]
