"""Hold and restore the state of a run.

The state has no random generators and no position in the data, because both are functions of
(seed, step).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves

from optim import ActivationPreconditioner
from optim.process_group import local
from optim.third_party import is_third_party
from trainer.checkpoint.groups import Groups, changes_since, group_problem, values_of
from trainer.checkpoint.read import (
    Checkpoint,
    CheckpointError,
    check_fits,
    load_into,
)
from trainer.checkpoint.sharded import read_all
from trainer.checkpoint.tensors import layer_problems, optimizer_state_problems
from trainer.evaluation_weights import train_weights
from trainer.sharding import shard_like


@dataclass
class TrainState:
    """Everything that changes during a run.

    `step` counts the optimizer steps, including the `skipped` steps whose loss or gradient was not
    finite. `skipped_in_row` counts the skipped steps since the last good one. `is_loss_finite` is
    False if the newest loss or gradient of the current weights is not; None if it is not known.
    """

    model: nn.Module
    optimizers: list[Optimizer]
    preconditioner: ActivationPreconditioner | None = None
    ema: AveragedModel | None = None
    step: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    saved_step: int = -1  # of the newest checkpoint that is known to be complete
    is_loss_finite: bool | None = None
    _first_groups: list[Groups] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._first_groups = [values_of(optimizer) for optimizer in self.optimizers]

    def count_step(self, is_finite: bool) -> None:
        """Count one optimizer step, which is skipped if it was not finite."""
        self.step += 1
        self.skipped += not is_finite
        self.skipped_in_row = 0 if is_finite else self.skipped_in_row + 1
        self.is_loss_finite = None if is_finite else False

    def count_validation(self, results: dict[str, Any] | None) -> None:
        """Note whether the validation loss of the current weights, if there is one, is finite."""
        if results is not None:
            self.is_loss_finite = math.isfinite(results["loss"])

    def non_finite(self) -> str:
        """Return the name of the first tensor that is not finite in this process, or "".

        Looks at weights, averaged weights and the state of the optimizers.
        """
        broken = (
            name
            for name, tensor in self._named_tensors()
            if not local(tensor.detach()).isfinite().all()
        )
        return next(broken, "")

    def _named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights, the averaged weights, and the tensors of the optimizers' states."""
        for prefix, model in self.evaluated().items():
            for name, weight in model.named_parameters():
                yield f"{prefix}{name}", weight
        for optimizer in self.optimizers:
            for i, values in enumerate(optimizer.state.values()):
                for key, value in values.items():
                    where = f"{key} of parameter {i} of {type(optimizer).__name__}"
                    yield from ((where, x) for x in tree_leaves(value) if isinstance(x, Tensor))

    def evaluated(self) -> dict[str, nn.Module]:
        """Return the models to evaluate by the prefix of their metrics: "" and, if kept, "ema_"."""
        return {"": self.model} | ({"ema_": self.ema.module} if self.ema else {})

    def optimizer_names(self) -> list[str]:
        """Return the names of the classes; with their modules, if other packages have them."""
        kinds = [(type(each), is_third_party(each)) for each in self.optimizers]
        return [
            f"{kind.__module__}.{kind.__name__}" if is_third else kind.__name__
            for kind, is_third in kinds
        ]

    def to_dict(self, *, is_sharded: bool) -> dict[str, Any]:
        """Return everything except weights, as types that `torch.load(weights_only=True)` accepts.

        Hyperparameters are left out because they always come from the run's settings. Tensors that
        other processes hold are on the meta device; unless `is_sharded`, the main process gets
        DoPr's.
        """
        gather = "none" if is_sharded else "first"
        pairs = zip(self._first_groups, self.optimizers, strict=True)
        return {
            "optimizers": [optimizer.state_dict()["state"] for optimizer in self.optimizers],
            "groups": [changes_since(first, optimizer) for first, optimizer in pairs],
            "dopr": self.preconditioner and self.preconditioner.state_dict(gather=gather),
            "n_averaged": int(self.ema.n_averaged) if self.ema else 0,
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load the state in `checkpoint`; change nothing on an error.

        Raises:
            CheckpointError: the checkpoint has another model or other optimizers, it lacks the
                averaged weights or the preconditioner state that this run needs, or a tensor does
                not fit what it belongs to.
        """
        saved = checkpoint.train
        self._check_optimizers(checkpoint)
        if self.ema and checkpoint.ema is None:
            raise CheckpointError(
                f"checkpoint {checkpoint.path} holds no averaged weights; resume with ema_decay=0"
            )
        if self.preconditioner:  # checks its state itself, and changes nothing on an error
            _restore_preconditioner(self.preconditioner, checkpoint)
        load_into(self.model, checkpoint.model, checkpoint.path)
        if self.ema and checkpoint.ema is not None:
            load_into(self.ema.module, checkpoint.ema, checkpoint.path)
            self.ema.n_averaged.fill_(saved["n_averaged"])
        for i, (optimizer, state) in enumerate(
            zip(self.optimizers, saved["optimizers"], strict=True)
        ):
            groups = optimizer.state_dict()["param_groups"]
            for group, changes in zip(groups, _groups_of(saved, i, optimizer), strict=True):
                group |= changes
            params = [param for group in optimizer.param_groups for param in group["params"]]
            sharded = {k: _shard_state(values, params[k]) for k, values in state.items()}
            optimizer.load_state_dict({"state": sharded, "param_groups": groups})
        train_weights(self.optimizers)
        self.step = checkpoint.step
        self.skipped = saved["skipped"]
        self.skipped_in_row = saved["skipped_in_row"]

    def _check_optimizers(self, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError unless the model and the optimizers can load their state."""
        saved, names = checkpoint.train["optimizers"], checkpoint.manifest["optimizers"]
        own_names = self.optimizer_names()
        if names != own_names or len(saved) != len(names):
            raise CheckpointError(
                f"checkpoint {checkpoint.path} was written with optimizers {names}, "
                f"but this run has {own_names}; use the same ones"
            )
        check_fits(self.model, checkpoint.model, checkpoint.path)
        has_stepped = checkpoint.step > checkpoint.train["skipped"]
        has_momentum = checkpoint.manifest["config"]["momentum"] > 0
        for i, (optimizer, state, name) in enumerate(
            zip(self.optimizers, saved, names, strict=True)
        ):
            may_be_empty = not has_stepped or (name == "SGD" and not has_momentum)
            problems = optimizer_state_problems(state, optimizer, may_be_empty=may_be_empty)
            groups = _groups_of(checkpoint.train, i, optimizer)
            problems += filter(None, [group_problem(groups, optimizer)])
            if problems:
                raise CheckpointError(
                    f"checkpoint {checkpoint.path}: the state of {name}: {'; '.join(problems[:5])}"
                )


def _groups_of(saved: dict[str, Any], i: int, optimizer: Optimizer) -> Groups:
    """Return the saved changes of the param groups of optimizer number i.

    Checkpoints of earlier versions have none, and their optimizers do not change any value.
    """
    if not saved.get("groups"):
        return [{} for _ in optimizer.param_groups]
    return read_all(saved["groups"][i])


def _shard_state(values: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """Shard an optimizer's state of one parameter: tensors of its shape are sharded like it."""
    return {
        key: shard_like(value, param).contiguous()  # fused optimizers read it as one block
        if getattr(value, "shape", None) == param.shape
        else read_all(value)
        for key, value in values.items()
    }


def _restore_preconditioner(
    preconditioner: ActivationPreconditioner, checkpoint: Checkpoint
) -> None:
    saved = checkpoint.train["dopr"]
    if saved is None:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} was written without DoPr; resume with dopr=false"
        )
    layers = {layer.name: layer for layer in preconditioner.layers}
    for name, layer in layers.items():
        problems = layer_problems(saved.get(name, {}), layer.tensors())
        if problems:
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: the preconditioner state of {layer.name}: "
                + "; ".join(problems)
            )
    state, unread = {}, None
    try:
        state = {  # a process reads only what it holds
            name: {
                key: read_all(value) if name not in layers or layers[name].needs(key) else value
                for key, value in values.items()
            }
            for name, values in saved.items()
        }
    except CheckpointError as error:
        unread = error  # raised after all processes have refused the state together
    try:
        preconditioner.load_state_dict(state)
    except (ValueError, FloatingPointError) as error:
        raise unread or CheckpointError(f"checkpoint {checkpoint.path}: {error}") from error
