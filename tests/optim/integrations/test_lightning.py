"""The callback of the Lightning Trainer: attach, save, resume, refuse."""

import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lightning", reason="lightning is not installed")
pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")

import lightning.pytorch
import pytorch_lightning
from torch.utils.data import DataLoader

from optim import ActivationPreconditioner
from optim.integrations.lightning import DoprCallback, check_supported
from tests.optim.integrations.tiny import assert_equal, weights
from tests.optim.models import mlp, regression

SETTINGS = {"gamma": 0.1, "refresh_every": 3, "sigma_beta": 0.9}  # state that outlives an epoch
BATCHES = 4


class Regression:
    """Train an mlp() by automatic or manual optimization; mixed into a LightningModule."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.net, self.automatic_optimization = mlp(), not manual

    def training_step(self, batch, batch_idx):
        x, target = batch
        loss = (self.net(x) - target).square().mean()
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [regression(step, n=16) for step in range(BATCHES)]


def module(library=lightning.pytorch, manual: bool = False):
    return type("Model", (Regression, library.LightningModule), {})(manual)


def fitted(
    folder, *, library=lightning.pytorch, model=None, manual=False, ckpt_path=None, **changes
):
    """Fit a model on the batches and return it with its trainer."""
    settings = {
        "callbacks": [DoprCallback(**SETTINGS)],
        **{"default_root_dir": folder, "accelerator": "cpu", "devices": 1, "max_epochs": 1},
        **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False},
        "enable_checkpointing": False,
    }
    trainer = library.Trainer(**settings | changes)
    model = model or module(library, manual)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about workers and loggers
        trainer.fit(model, DataLoader(data(), batch_size=None), ckpt_path=ckpt_path)
    return model, trainer


def by_hand(*, accumulate: int = 1, clip: float | None = None) -> torch.nn.Module:
    """Return the model after a plain loop: backward, clip, step."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ActivationPreconditioner(model, **SETTINGS).attach(optimizer)
    for i, (x, target) in enumerate(data()):
        ((model(x) - target).square().mean() / accumulate).backward()
        if (i + 1) % accumulate:
            continue
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("library", [lightning.pytorch, pytorch_lightning])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_the_steps_are_those_of_a_plain_loop(tmp_path, library, manual):
    model, _ = fitted(tmp_path, library=library, manual=manual)
    assert_equal(weights(model.net), weights(by_hand()))


def test_gradients_are_accumulated_before_a_step(tmp_path):
    model, _ = fitted(tmp_path, accumulate_grad_batches=2)
    assert_equal(weights(model.net), weights(by_hand(accumulate=2)))


def test_the_raw_gradient_is_clipped_and_then_preconditioned(tmp_path):
    model, _ = fitted(tmp_path, gradient_clip_val=1e-3)
    assert_equal(weights(model.net), weights(by_hand(clip=1e-3)))


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, manual):
    whole, _ = fitted(tmp_path, manual=manual, max_epochs=2)
    _, first = fitted(tmp_path, manual=manual)
    path = tmp_path / "first.ckpt"
    first.save_checkpoint(path)
    again, trainer = fitted(tmp_path, manual=manual, max_epochs=2, ckpt_path=path)
    assert trainer.global_step == 2 * BATCHES
    assert_equal(weights(again), weights(whole))


def test_a_second_fit_starts_with_new_statistics(tmp_path):
    callback = DoprCallback(**SETTINGS)
    for max_steps in (2, 1):
        fitted(tmp_path, callbacks=[callback], max_steps=max_steps)
        assert f"steps: {max_steps}," in callback.summary()
        assert {layer["step"] for layer in callback.state_dict().values()} == {max_steps}


def test_the_end_of_a_fit_detaches_and_keeps_the_report(tmp_path):
    callback = DoprCallback(**SETTINGS)
    model, _ = fitted(tmp_path, callbacks=[callback])
    assert callback.preconditioner is None
    assert [row["covered"] for row in callback.report()] == [True, True]
    again = ActivationPreconditioner(model, **SETTINGS)
    assert [row["name"] for row in again.report()] == [row["name"] for row in callback.report()]


class Fails(lightning.pytorch.Callback):
    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == 2:
            raise KeyError("of the user")


def test_a_fit_that_raises_detaches_after_its_checkpoint_has_the_state(tmp_path):
    model = module()
    saves = lightning.pytorch.callbacks.OnExceptionCheckpoint(tmp_path)
    callbacks = [DoprCallback(**SETTINGS), Fails(), saves]
    with pytest.raises(KeyError, match="of the user"):
        fitted(tmp_path, model=model, callbacks=callbacks, enable_checkpointing=True)
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=False)["callbacks"]
    assert {layer["step"] for layer in saved["DoprCallback"].values()} == {2}
    fitted(tmp_path, model=model, max_steps=1)


def test_a_fit_that_cannot_load_its_state_detaches(tmp_path):
    model, trainer = fitted(tmp_path, max_steps=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    other = DoprCallback(gamma=0.1, block_diagonal=2)
    with pytest.raises(ValueError, match="does not fit"):
        fitted(tmp_path, model=model, callbacks=[other], ckpt_path=tmp_path / "one.ckpt")
    fitted(tmp_path, model=model, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")


def test_a_checkpoint_without_a_state_is_refused(tmp_path):
    _, trainer = fitted(tmp_path, callbacks=[], max_steps=1)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="no state of DoprCallback"):
        fitted(tmp_path, max_epochs=2, ckpt_path=tmp_path / "plain.ckpt")


@pytest.mark.parametrize(
    ("strategy", "precision", "cure"),
    [
        ("FSDPStrategy", "32-true", "FSDP1.*ModelParallelStrategy"),
        ("DeepSpeedStrategy", "32-true", "use DDPStrategy"),
        ("DDPStrategy", "16-mixed", "use 'bf16-mixed'"),
    ],
)
def test_training_that_does_not_fit_is_refused_with_a_cure(strategy, precision, cure):
    kind = getattr(lightning.pytorch.strategies, strategy)
    trainer = SimpleNamespace(strategy=kind.__new__(kind), precision=precision)
    with pytest.raises(ValueError, match=cure):
        check_supported(trainer)
