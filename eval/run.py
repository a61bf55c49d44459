"""Load what a run left behind: the model in eval mode, its tokenizer, its settings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.tokenizer import Tokenizer
from model import GPT, GPTConfig
from trainer.checkpoint.read import Checkpoint, CheckpointError, load_into, open_checkpoint

ENVIRONMENT = ("device", "threads", "python", "torch", "git", "world")  # see runlog.environment


@dataclass(frozen=True)
class Run:
    """A trained model with everything that is needed to evaluate it."""

    path: Path  # the checkpoint's folder
    step: int
    model: GPT
    tokenizer: Tokenizer
    config: dict[str, Any]  # the run's settings
    environment: dict[str, Any]  # where it was trained: device, versions, git revision


def load_run(path: str | Path, *, device: str | torch.device = "cpu", ema: bool = False) -> Run:
    """The run at `path`, an out_dir (newest good checkpoint) or one checkpoint's folder.

    Args:
        ema: the averaged weights instead of the last ones.
    Raises:
        CheckpointError: there is no usable checkpoint, or no averaged weights in it.
    """
    return run_of(open_checkpoint(Path(path)), device=device, ema=ema)


def run_of(found: Checkpoint, *, device: str | torch.device = "cpu", ema: bool = False) -> Run:
    """The same of a checkpoint that was opened already."""
    weights = found.ema if ema else found.model
    if weights is None:
        raise CheckpointError(f"checkpoint {found.path} holds no averaged weights (ema_decay=0)")
    model = GPT(GPTConfig(**found.manifest["model"]))
    load_into(model, weights, found.path)
    return Run(
        path=found.path,
        step=found.step,
        model=model.to(device).eval(),
        tokenizer=Tokenizer.load(found.path / "tokenizer.json"),
        config=found.manifest["config"],
        environment={key: found.manifest[key] for key in ENVIRONMENT},
    )
