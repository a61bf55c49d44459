"""Precondition the optimizer of a Hugging Face Trainer or of a trainer of TRL."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..dopr.preconditioner import ActivationPreconditioner

STATE_FILE = "dopr.pt"
TRAINER_STATE_FILE = "trainer_state.json"
UNSUPPORTED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


class DoprCallback(TrainerCallback):
    """Precondition every step of a Trainer, and keep the state beside each of its checkpoints.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[DoprCallback(gamma=0.1)])

    `preconditioner` exists once training has begun. Every call of `trainer.train()` constructs a
    new one. If the call resumes, the state comes from the file `dopr.pt` of the checkpoint, which
    must be `output_dir/checkpoint-N` or the folder in `TrainingArguments.resume_from_checkpoint`.
    A checkpoint of a hyperparameter search, or with `save_only_model`, holds no state.

    Args:
        gamma, settings: see `ActivationPreconditioner`.
    Raises:
        ValueError: when training begins, if the settings do not fit the model, or the training uses
            fp16, DeepSpeed, Megatron-LM, XLA, FSDP1 or nn.DataParallel.
        FileNotFoundError: when training resumes from a checkpoint without a state.
    """

    preconditioner: ActivationPreconditioner | None = None

    def __init__(self, *, gamma: float, **settings: Any) -> None:
        self._settings = {"gamma": gamma, **settings}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_supported(args, AcceleratorState())
        saved = saved_state(args, state) if state.global_step else None
        if self.preconditioner is not None:
            self.preconditioner.detach()
        self.preconditioner = ActivationPreconditioner(kwargs["model"], **self._settings)
        self.preconditioner.attach(kwargs["optimizer"])
        if saved is not None:
            self.preconditioner.load_state_dict(saved)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.preconditioner is None or args.save_only_model or state.is_hyper_param_search:
            return
        saved = self.preconditioner.state_dict()  # all processes must call it
        if args.should_save:
            path = checkpoint_folder(args, state) / STATE_FILE
            torch.save(saved, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder in which the Trainer saves a checkpoint after the current step."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def saved_state(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """Load the preconditioner's state from the checkpoint from which the Trainer resumes.

    Callbacks do not see the argument of `trainer.train()`. If the folder is another one, the
    histories of logged losses differ.
    """
    folder = Path(args.resume_from_checkpoint or checkpoint_folder(args, state))
    if not (folder / STATE_FILE).exists():
        raise FileNotFoundError(
            f"{folder} has no {STATE_FILE}, the state of DoPr: resume from a checkpoint that was "
            "saved with DoprCallback; if it is in another folder, also set "
            "TrainingArguments(resume_from_checkpoint=FOLDER)"
        )
    history = TrainerState.load_from_json(str(folder / TRAINER_STATE_FILE)).log_history
    if history != state.log_history:
        raise ValueError(
            f"{folder} is not the checkpoint from which training resumes: set "
            "TrainingArguments(resume_from_checkpoint=FOLDER) to the folder given to train()"
        )
    return torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)


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
    if problems:
        raise ValueError("DoPr does not support this training: " + "; ".join(problems))
