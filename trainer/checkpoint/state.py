"""Everything that a run is at one instant: what a checkpoint holds, and what resuming puts back.

Randomness and the position in the data are not here: both are functions of (seed, step).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from optim import ActivationPreconditioner
from trainer.checkpoint.read import (
    Checkpoint,
    CheckpointError,
    load_into,
    plain_state,
)
from trainer.checkpoint.sharded import read_all
from trainer.checkpoint.write import save_checkpoint, save_sharded
from trainer.parallel import Parallel
from trainer.sharding import laid_out


@dataclass
class TrainState:
    """The mutable half of a run.

    `step` counts optimizer steps done; `skipped` those among them whose gradient was not finite,
    `skipped_in_row` the ones since the last good step.
    """

    model: nn.Module
    optimizers: list[Optimizer]
    preconditioner: ActivationPreconditioner | None = None
    ema: AveragedModel | None = None
    step: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    saved_step: int = -1  # of the newest checkpoint

    def count_step(self, is_finite: bool) -> None:
        """One more optimizer step was done, or skipped."""
        self.step += 1
        self.skipped += not is_finite
        self.skipped_in_row = 0 if is_finite else self.skipped_in_row + 1

    def evaluated(self) -> dict[str, nn.Module]:
        """The weights, and their average if there is one, by the prefix of what is said of them."""
        return {"": self.model} | ({"ema_": self.ema.module} if self.ema else {})

    def save(
        self,
        root: Path,
        parallel: Parallel,
        *,
        manifest: dict[str, Any],
        tokenizer: bytes,
        keep: int,
        is_sharded: bool = False,
    ) -> None:
        """Write a checkpoint under `root`, unless this step already has one. All processes call it.

        Raises:
            CheckpointError: it could not be written.
        """
        if self.step == self.saved_step:
            return
        manifest = {**manifest, "optimizers": self._optimizer_names()}
        files = {"tokenizer_json": tokenizer, "manifest": manifest, "keep": keep}
        tensors = {"model": plain_state(self.model), "train": self.to_dict()}
        tensors["ema"] = plain_state(self.ema) if self.ema else None
        if is_sharded:
            save_sharded(root, self.step, parallel, **tensors, **files)
        else:
            whole = parallel.saved(tensors)
            write = partial(save_checkpoint, root, self.step, **whole, **files)
            parallel.raise_on_all_ranks(
                write if parallel.is_main else lambda: None, CheckpointError
            )
        self.saved_step = self.step

    def _optimizer_names(self) -> list[str]:
        return [type(optimizer).__name__ for optimizer in self.optimizers]

    def to_dict(self) -> dict[str, Any]:
        """All but the weights, in types that `torch.load(weights_only=True)` accepts.

        Hyperparameters are left out: they always come from the run's settings.
        """
        return {
            "optimizers": [optimizer.state_dict()["state"] for optimizer in self.optimizers],
            "dopr": self.preconditioner.state_dict() if self.preconditioner else None,
            "n_averaged": int(self.ema.n_averaged) if self.ema else 0,
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become the state that `checkpoint` holds.

        Raises:
            CheckpointError: it holds another model, other optimizers, or lacks the averaged weights
                or the preconditioner's statistics that this run wants.
        """
        saved = checkpoint.train
        theirs, ours = checkpoint.manifest["optimizers"], self._optimizer_names()
        if theirs != ours:
            raise CheckpointError(
                f"checkpoint {checkpoint.path} was written with optimizers {theirs}, "
                f"this run has {ours}; use the same ones"
            )
        if self.ema and checkpoint.ema is None:
            raise CheckpointError(
                f"checkpoint {checkpoint.path} holds no averaged weights; resume with ema_decay=0"
            )
        load_into(self.model, checkpoint.model, checkpoint.path)
        if self.preconditioner:
            _restore_preconditioner(self.preconditioner, checkpoint)
        if self.ema and checkpoint.ema is not None:
            load_into(self.ema.module, checkpoint.ema, checkpoint.path)
            self.ema.n_averaged.fill_(saved["n_averaged"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]
            params = [param for group in optimizer.param_groups for param in group["params"]]
            placed = {i: _placed(values, params[i]) for i, values in state.items()}
            optimizer.load_state_dict({"state": placed, "param_groups": groups})
        self.step = self.saved_step = checkpoint.step
        self.skipped = saved["skipped"]
        self.skipped_in_row = saved["skipped_in_row"]


def _placed(values: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """An optimizer's state of one parameter; what has its shape lies as it does."""
    return {
        key: laid_out(value, param)
        if getattr(value, "shape", None) == param.shape
        else read_all(value)
        for key, value in values.items()
    }


def _restore_preconditioner(own: ActivationPreconditioner, checkpoint: Checkpoint) -> None:
    saved = checkpoint.train["dopr"]
    if saved is None:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} was written without DoPr; resume with dopr=false"
        )
    try:
        own.load_state_dict(read_all(saved))
    except (ValueError, FloatingPointError) as error:
        raise CheckpointError(f"checkpoint {checkpoint.path}: {error}") from error
