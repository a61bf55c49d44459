"""Precondition the optimizers of a Lightning Trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..dopr.preconditioner import ActivationPreconditioner

UNSUPPORTED = {  # strategy, as the class is called in `lightning` and in `pytorch_lightning`
    "DeepSpeedStrategy": "has its own optimizer step: use DDPStrategy or ModelParallelStrategy",
    "FSDPStrategy": "flattens the weights (FSDP1): use ModelParallelStrategy with fully_shard",
    "XLAStrategy": "is not supported: use DDPStrategy",
}


class DoprCallback(Callback):
    """Precondition every step of a Lightning Trainer, and keep the state in its checkpoints.

        trainer = Trainer(callbacks=[DoprCallback(gamma=0.1)], gradient_clip_val=1.0)

    Works with automatic and manual optimization. A step clips the raw gradient, then preconditions.
    `preconditioner` exists from `on_fit_start` on. Every call of `trainer.fit()` constructs a new
    one, and loads its state if `ckpt_path` is given.

    Args:
        gamma, settings: see `ActivationPreconditioner`.
    Raises:
        ValueError: when `fit` begins, if the settings do not fit the model, the checkpoint has no
            state, or the training uses fp16, DeepSpeed, FSDP1 or XLA.
    """

    preconditioner: ActivationPreconditioner | None = None

    def __init__(self, *, gamma: float, **settings: Any) -> None:
        self._settings = {"gamma": gamma, **settings}
        self._loaded: dict[str, Any] | None = None  # read from the checkpoint of this `fit`

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_supported(trainer)
        if self.preconditioner is not None:
            self.preconditioner.detach()
        self.preconditioner = self._loaded = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        preconditioner = ActivationPreconditioner(pl_module, **self._settings)
        self.preconditioner = preconditioner.attach(*trainer.optimizers)
        if self._loaded is not None:
            self.preconditioner.load_state_dict(self._loaded)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is not None and self._loaded is None:
            raise ValueError(
                f"{trainer.ckpt_path} has no state of DoprCallback: resume from a checkpoint that "
                "was saved with it, or load only the weights of this one"
            )
        self._loaded = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self.preconditioner is None else self.preconditioner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state now, or in `on_fit_start` if the strategy restores before that."""
        self._loaded = state_dict
        if self.preconditioner is not None:
            self.preconditioner.load_state_dict(state_dict)


def check_supported(trainer: Trainer) -> None:
    """Raise ValueError with all reasons why DoPr cannot precondition this training."""
    names = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    problems = [f"{name} {cure}" for name, cure in UNSUPPORTED.items() if name in names]
    if str(trainer.precision).startswith("16"):
        problems.append(f"precision={trainer.precision!r}: use 'bf16-mixed' or '32-true'")
    if problems:
        raise ValueError("DoPr does not support this training: " + "; ".join(problems))
