"""Precondition the optimizer of a Hugging Face Trainer or of a trainer of TRL."""

from __future__ import annotations

import json
import os
import uuid
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .callback import AttachedInTraining, refuse

STATE_FILE = "dopr.pt"
UNSUPPORTED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


class DoprCallback(AttachedInTraining, TrainerCallback, ExportableState):
    """Precondition every step of a Trainer, and keep the state beside each of its checkpoints.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[DoprCallback(gamma=0.1)])

    Every call of `trainer.train()` constructs a new preconditioner when training begins, and
    detaches it at the end. `preconditioner` is None before and after; `summary()` and `report()`
    remain. The Trainer calls no hook if training raises: then call `detach()` before you use
    another callback on the model.

    If the call resumes, the state comes from the file `dopr.pt` of the checkpoint, which must be
    `output_dir/checkpoint-N` or the folder in `TrainingArguments.resume_from_checkpoint`. The file
    and the checkpoint hold the same random id, so that no other state is loaded. A checkpoint of a
    hyperparameter search, or with `save_only_model`, holds no state.

    Args:
        gamma, settings: see `ActivationPreconditioner`.
    Raises:
        ValueError: when training begins, if the settings do not fit the model, `dopr.pt` is of
            another checkpoint, or the training uses fp16, DeepSpeed, Megatron-LM, XLA, FSDP1 or
            nn.DataParallel.
        FileNotFoundError: when training resumes from a checkpoint without a state.
    """

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes into `trainer_state.json`, with a new id for every save.

        With `restore_callback_states_from_checkpoint`, it constructs a new callback from this.
        """
        settings = json.loads(json.dumps(self._settings, default=_builtin))
        return {"args": settings, "attributes": {"checkpoint_id": uuid.uuid4().hex}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_supported(args, AcceleratorState())
        saved = self._saved_state(args, state) if state.global_step else None
        self._attach(kwargs["model"], [kwargs["optimizer"]], saved)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.preconditioner is None or args.save_only_model or state.is_hyper_param_search:
            return
        saved = self.preconditioner.state_dict()  # all processes must call it
        if args.should_save:
            path = checkpoint_folder(args, state) / STATE_FILE
            saved = {"checkpoint_id": self._checkpoint_id(state), "preconditioner": saved}
            torch.save(saved, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.detach()

    def _checkpoint_id(self, state: TrainerState) -> str | None:
        """Return the id in this content of `trainer_state.json`, or None if it has none."""
        exported: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
        return exported.get(type(self).__name__, {}).get("attributes", {}).get("checkpoint_id")

    def _saved_state(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """Load the preconditioner's state of the checkpoint from which the Trainer resumes.

        Callbacks do not see the argument of `trainer.train()`, only the `TrainerState` that it
        loaded. The id in it shows whether `dopr.pt` was saved with it.
        """
        path = resumed_folder(args, state) / STATE_FILE
        if not path.exists():
            raise FileNotFoundError(
                f"{path.parent} has no {STATE_FILE}, the state of DoPr: resume from a checkpoint "
                "that was saved with DoprCallback; if it is in another folder, also set "
                "TrainingArguments(resume_from_checkpoint=FOLDER)"
            )
        saved = torch.load(path, map_location="cpu", weights_only=True)
        expected = self._checkpoint_id(state)
        if expected is None or saved.get("checkpoint_id") != expected:
            raise ValueError(
                f"{path} is not of the checkpoint from which training resumes: set "
                "TrainingArguments(resume_from_checkpoint=FOLDER) to the folder given to train(), "
                f"which must have been saved with {type(self).__name__}"
            )
        return saved["preconditioner"]


def _builtin(value: Any) -> Any:
    """Convert what JSON does not know: numbers (of NumPy, say) and collections of names."""
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    return list(value)


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder in which the Trainer saves a checkpoint after the current step."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def resumed_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder named in the arguments, or the checkpoint of this step in `output_dir`.

    True names the last checkpoint in `output_dir`. If training resumes there, it is of this step.
    """
    given: Any = args.resume_from_checkpoint
    return Path(given) if given and given is not True else checkpoint_folder(args, state)


def check_supported(args: TrainingArguments, accelerator: AcceleratorState) -> None:
    """Raise ValueError with all reasons why DoPr cannot precondition this training."""
    kind = accelerator.distributed_type
    problems = []
    if accelerator.mixed_precision == "fp16":
        problems.append("fp16 scales the loss: set bf16=True, or train in float32")
    if kind in UNSUPPORTED:
        problems.append(f"{kind.value} has its own optimizer step: use DDP or FSDP2")
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        problems.append("FSDP1 flattens the weights: set fsdp_config={'fsdp_version': 2}")
    if args.n_gpu > 1:
        problems.append("nn.DataParallel copies the model: start the script with torchrun")
    refuse(problems)
