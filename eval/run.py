"""Load a trained run: the model in eval mode, its tokenizer and its settings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.tokenizer import Tokenizer
from eval.hf_import import is_hf_folder, load_hf
from model import GPT, GPTConfig
from trainer.checkpoint.read import Checkpoint, CheckpointError, load_into, open_checkpoint

# The fields of trainer.provenance.provenance, which a checkpoint's manifest repeats.
ENVIRONMENT = ("device", "threads", "python", "torch", "git", "world")


@dataclass(frozen=True)
class Run:
    """A trained model with everything needed to evaluate it."""

    path: Path  # the checkpoint's folder
    step: int  # 0 for a Hugging Face folder, whose config and environment are empty
    model: GPT
    tokenizer: Tokenizer
    config: dict[str, Any]  # the settings of the training run
    environment: dict[str, Any]  # device, versions and git revision of the training run


def load_run(path: str | Path, *, device: str | torch.device = "cpu", ema: bool = False) -> Run:
    """Load a run from disk.

    The ids with which the vocabulary of a Hugging Face folder may be padded are dropped; the model
    then gives them no probability.

    Args:
        path: a run's out_dir (its newest undamaged checkpoint is loaded), a checkpoint's folder, or
            a Hugging Face folder of a GPT-2 with its tokenizer.
        device: the device to put the model on.
        ema: load the averaged weights instead of the last ones.
    Raises:
        CheckpointError: there is no usable checkpoint, or it contains no averaged weights.
        ValueError: the Hugging Face folder cannot be used.
    """
    path = Path(path)
    if is_hf_folder(path):
        if ema:
            raise ValueError(f"{path} has no averaged weights: it is a Hugging Face folder")
        tokenizer = Tokenizer.load(path / "tokenizer.json")
        model = load_hf(path, vocab_size=tokenizer.n_vocab).to(device).eval()
        return Run(path, 0, model, tokenizer, {}, {})
    return run_of(open_checkpoint(path), device=device, ema=ema)


def run_of(found: Checkpoint, *, device: str | torch.device = "cpu", ema: bool = False) -> Run:
    """Build a run from a checkpoint that is already open. See `load_run`."""
    weights = found.ema if ema else found.model
    if weights is None:
        raise CheckpointError(
            f"checkpoint {found.path} has no averaged weights: the run had ema_decay=0"
        )
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
