"""Precondition the optimizers of a Lightning Trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from .callback import AttachedInTraining, refuse

UNSUPPORTED = {  # strategy, as the class is called in `lightning` and in `pytorch_lightning`
    "DeepSpeedStrategy": "has its own optimizer step: use DDPStrategy or ModelParallelStrategy",
    "FSDPStrategy": "flattens the weights (FSDP1): use ModelParallelStrategy with fully_shard",
    "XLAStrategy": "is not supported: use DDPStrategy",
}


class DoprCallback(AttachedInTraining, Callback):
    """Precondition every step of a Lightning Trainer, and keep the state in its checkpoints.

        trainer = Trainer(callbacks=[DoprCallback(gamma=0.1)], gradient_clip_val=1.0)

    Works with automatic and manual optimization. A step clips the raw gradient, then preconditions.
    Every call of `trainer.fit()` constructs a new preconditioner in `on_fit_start`, loads its state
    if `ckpt_path` is given, and detaches it in `teardown`, or when it raises in a single process.
    `preconditioner` is None before and after. `summary()`, `report()` and the state for
    `trainer.save_checkpoint()` remain. If one of several processes raised, call `detach()`.

    Args:
        gamma, settings: see `ActivationPreconditioner`.
    Raises:
        ValueError: when `fit` begins, if the settings do not fit the model, the checkpoint has no
            state, or the training uses fp16, DeepSpeed, FSDP1 or XLA.
    """

    _state: dict[str, Any] | None = None  # of the checkpoint until training starts; at the end

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_supported(trainer)
            self.detach()
            self._state = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(pl_module, trainer.optimizers, self._state)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is not None and self._state is None:
            raise ValueError(
                f"{trainer.ckpt_path} has no state of DoprCallback: resume from a checkpoint that "
                "was saved with it, or load only the weights of this one"
            )
        self._state = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._end()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if trainer.world_size == 1:  # the other processes may not have raised, nor save a state
            self._end()

    def _end(self) -> None:
        """Detach, and keep the state for checkpoints that are saved later."""
        if self.preconditioner is not None:
            try:
                self._state = self.preconditioner.state_dict()
            finally:
                self.detach()

    def state_dict(self) -> dict[str, Any]:
        if self.preconditioner is None:
            return self._state or {}
        return self.preconditioner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state now, or in `on_fit_start` if the strategy restores before that."""
        self._state = state_dict
        if self.preconditioner is not None:
            self.preconditioner.load_state_dict(state_dict)


def check_supported(trainer: Trainer) -> None:
    """Raise ValueError with all reasons why DoPr cannot precondition this training."""
    names = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    problems = [f"{name} {cure}" for name, cure in UNSUPPORTED.items() if name in names]
    if str(trainer.precision).startswith("16"):
        problems.append(f"precision={trainer.precision!r}: use 'bf16-mixed' or '32-true'")
    refuse(problems)
