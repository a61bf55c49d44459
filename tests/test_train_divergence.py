"""Steps that are not finite are skipped, and weights that are broken are never saved as good."""

import os
import signal

import pytest
import torch
from torch import nn

import train
from model import GPT
from tests.tiny import argv, metrics, weights
from trainer.checkpoint import read as checkpoint
from trainer.checkpoint.state import TrainState


def poison(patch, *, steps, value=float("nan")):
    """Multiply the loss of these steps by a value that is not finite."""
    forward, calls = GPT.forward, 0

    def poisoned(self, idx, targets=None, **options):
        nonlocal calls
        logits, loss = forward(self, idx, targets, **options)
        if self.training:
            loss = loss * value if calls // 2 in steps else loss  # two micro-batches per step
            calls += 1
        return logits, loss

    patch.setattr(GPT, "forward", poisoned)


@pytest.mark.parametrize("dopr", [False, True])
def test_a_step_that_is_not_finite_is_skipped_and_counted(dataset, tmp_path, monkeypatch, dopr):
    poison(monkeypatch, steps={5})
    out = tmp_path / "run"
    changes = {"save_every": 1, "keep_checkpoints": 99, "dopr": dopr, "optimizer": "muon"}
    assert train.main(argv(dataset, out, max_steps=6, **changes)) == 0
    assert weights(out, 6) == weights(out, 5)  # step number 5 took the run from 5 to 6
    assert weights(out, 5) != weights(out, 4)
    before, after = (
        checkpoint.load_checkpoint(out / f"checkpoints/step-{i:08d}").train for i in (5, 6)
    )
    torch.testing.assert_close(before["optimizers"], after["optimizers"], rtol=0, atol=0)
    if dopr:
        for name, saved in before["dopr"].items():
            assert torch.equal(saved["sigma"], after["dopr"][name]["sigma"])
            assert not after["dopr"][name]["gram"].isnan().any()
    assert after["skipped"] == 1
    assert metrics(out, "train")[-1]["skipped"] == 1


def test_too_many_such_steps_end_the_run_and_name_the_last_checkpoint(
    dataset, tmp_path, monkeypatch, capsys
):
    poison(monkeypatch, steps=range(6, 99), value=float("inf"))
    assert train.main(argv(dataset, tmp_path / "run", max_skipped=3)) == train.EXIT_DIVERGED
    message = capsys.readouterr().err
    assert "3 steps in a row had a loss or gradient that was not finite" in message
    assert "step-00000004" in message  # step 8 followed a skipped step, so it was not saved


@pytest.mark.parametrize("max_steps", [1, 4])
def test_weights_that_a_step_broke_are_not_saved_as_the_last_ones(
    dataset, tmp_path, capsys, max_steps
):
    out = tmp_path / "run"
    changes = {"lr": 1e30, "warmup_steps": 0, "max_steps": max_steps}
    assert train.main(argv(dataset, out, **changes)) == train.EXIT_DIVERGED
    assert checkpoint.open_checkpoint(out).step == 0
    assert "resume" in capsys.readouterr().err
    assert metrics(out, "run")[-1]["event"] == "start"


def test_a_divergence_names_a_checkpoint_that_is_not_damaged(
    dataset, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    count_step = train.TrainState.count_step

    def damage(self, is_finite):
        count_step(self, is_finite)
        if self.step == 9:
            (out / "checkpoints/step-00000008/train.pt").write_bytes(b"")

    monkeypatch.setattr(train.TrainState, "count_step", damage)
    poison(monkeypatch, steps=range(9, 99))
    changes = {"max_skipped": 2, "keep_checkpoints": 9, "async_save": False}
    assert train.main(argv(dataset, out, **changes)) == train.EXIT_DIVERGED
    assert f"--resume={out / 'checkpoints/step-00000004'} --lr=" in capsys.readouterr().err


def test_a_stop_after_a_skipped_step_keeps_the_previous_checkpoint(
    dataset, tmp_path, monkeypatch, capsys
):
    count_step = train.TrainState.count_step

    def stop(self, is_finite):
        count_step(self, is_finite)
        if self.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.TrainState, "count_step", stop)
    poison(monkeypatch, steps={6})
    assert train.main(argv(dataset, tmp_path / "run")) == 128 + signal.SIGTERM
    assert "step 7 is not saved" in capsys.readouterr().out
    assert checkpoint.open_checkpoint(tmp_path / "run").step == 4


@pytest.mark.parametrize("broken", [0, 1])
def test_a_state_that_is_not_finite_is_found_in_every_optimizer(broken):
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizers = [torch.optim.AdamW([weight]) for weight in weights]
    state = TrainState(nn.ParameterList(weights), optimizers)
    for weight, optimizer in zip(weights, optimizers, strict=True):
        weight.grad = torch.ones(2)
        optimizer.step()
    assert state.non_finite() == ""
    optimizers[broken].state[weights[broken]]["nested"] = [{"x": torch.tensor(float("nan"))}]
    assert state.non_finite() == "nested of parameter 0 of AdamW"
