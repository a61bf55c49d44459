"""Fine-tune a local Hugging Face model on questions with answers, with or without DoPr.

    python -m studies.finetune.train --model FOLDER --data train.jsonl --out FOLDER --lr 1e-3
    python -m studies.finetune.grade --help          exact answers of the trained model

The data have one JSON object per line with the keys "question" and "answer", as GSM8K has. Only
the tokens of the answers are scored. The loss of a step is their mean. The learning rate follows a
cosine to zero after a warmup over a tenth of the steps.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eval.command import (
    DEVICES,
    at_least,
    command_parser,
    output_folder,
    pick_device,
    reported_errors,
)
from optim.build import OPTIMIZERS, third_party
from optim.dopr.preconditioner import ActivationPreconditioner
from optim.schedule import lr_scale
from studies.finetune.models import (
    add_lora,
    context_length,
    head_name,
    load,
    replace_conv1d,
    save,
)
from studies.finetune.questions import (
    Example,
    answer_loss,
    batch_of,
    encode,
    padding_id,
    read_questions,
    training_batches,
)
from studies.sweep.optimizers import build, finish, step
from studies.sweep.variants import EXACT_DOPR, FAST_DOPR
from trainer.settings import FIELDS

OPTIMIZER = ("optimizer", "optimizer_args", "lr")  # fields of Settings
MODES: dict[str, dict[str, Any]] = {  # settings of ActivationPreconditioner besides γ
    "none": {},
    "exact": EXACT_DOPR,
    "fast": FAST_DOPR,
}


class DivergedError(ValueError):
    """The loss became infinite or NaN."""


@dataclass(frozen=True)
class Settings:
    """The settings of a training. They determine the result for a given model and data."""

    lr: float
    steps: int
    optimizer: str = "adamw"  # see optim.build
    optimizer_args: str = ""
    dopr: dict[str, Any] = field(default_factory=dict)  # of ActivationPreconditioner; {}: without
    lora_rank: int | None = None  # None trains the whole model
    batch_size: int = 32  # questions per step
    micro_batch_size: int | None = None  # questions per forward; None: all of them
    seed: int = 0  # of the order of the data, the adapters and dropout


def finetune(
    model: Any,
    examples: Sequence[Example],
    settings: Settings,
    pad_id: int,
    show: Callable[[str], object] = print,
) -> tuple[Any, list[float]]:
    """Return the model in eval mode, trained in place, and the loss of each step.

    Args:
        pad_id: the id that fills up batches. It has no effect.
        show: gets the weights that DoPr covers and ten lines on the progress.
    Raises:
        DivergedError: the loss of a step is not finite.
        ValueError: a setting is out of range, or the optimizer cannot train a weight.
    """
    torch.manual_seed(settings.seed)
    if settings.lora_rank is None:
        replace_conv1d(model)
    else:
        model = add_lora(model, settings.lora_rank)
    optimizers = build(
        *(model, settings.optimizer, settings.lr, {}), optimizer_args=settings.optimizer_args
    )
    preconditioner = None
    if settings.dopr:
        preconditioner = ActivationPreconditioner(model, exclude=head_name(model), **settings.dopr)
        preconditioner.attach(*optimizers)
        show(preconditioner.summary())
    model.train()
    losses: list[float] = []
    steps, every = settings.steps, max(1, settings.steps // 10)
    for chosen in training_batches(examples, settings.batch_size, steps, settings.seed):
        losses.append(_backward(model, chosen, settings.micro_batch_size, pad_id))
        schedule = {"schedule": "cosine", "warmup_steps": steps // 10, "min_lr_ratio": 0}
        step(optimizers, lr_scale(len(losses) - 1, max_steps=steps, **schedule))
        if len(losses) % every == 0:
            show(f"step {len(losses)}  loss {losses[-1]:.4f}")
    if preconditioner:
        preconditioner.detach()
    finish(optimizers)
    return model.eval(), losses


def _backward(
    model: Any, examples: Sequence[Example], micro_batch_size: int | None, pad_id: int
) -> float:
    """Add the gradient of the mean loss over the answers' tokens of a step; return this loss."""
    n_scored, total = sum(len(each.answer) for each in examples), 0.0
    size = micro_batch_size or len(examples)
    for start in range(0, len(examples), size):
        batch = batch_of(examples[start : start + size], pad_id).to(model.device)
        loss = answer_loss(model, batch) / n_scored
        if not loss.isfinite():
            raise DivergedError("the loss is not finite; use a lower learning rate")
        loss.backward()
        total += float(loss.detach())
    return total


def dopr_settings(
    mode: str, gamma: float | None = None, fresh_mean: bool = False
) -> dict[str, Any]:
    """Return the settings of ActivationPreconditioner; {} for the mode "none".

    Raises ValueError if others are given for that mode.
    """
    if mode != "none":
        damping = FIELDS["gamma"].default if gamma is None else gamma
        return MODES[mode] | {"gamma": damping, "fresh_mean": fresh_mean}
    if gamma is not None or fresh_mean:
        raise ValueError("--gamma and --fresh_mean have no effect without DoPr; add --dopr=fast")
    return {}


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("studies.finetune.train", __doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a Hugging Face model")
    add("--data", type=Path, required=True, help="JSON lines")
    add("--out", type=output_folder, required=True, help="folder of the trained model")
    add("--question_key", default="question")
    add("--answer_key", default="answer")
    names = ", ".join(OPTIMIZERS)
    add("--optimizer", default="adamw", help=f"{names}, or any class, see docs/optimizers.md")
    add("--optimizer_args", default="", help="arguments of that class: betas=(0.9,0.95),...")
    add("--dopr", choices=MODES, default="none")
    add("--gamma", type=float, help=f"damping of DoPr; default: {FIELDS['gamma'].default:g}")
    add("--fresh_mean", action="store_true", help="with --dopr=fast; see docs/fresh_mean.md")
    add("--lora_rank", type=int, help="train adapters of this rank; default: the whole model")
    add("--lr", type=float, required=True)
    add("--steps", type=int, default=300)
    add("--batch_size", type=int, default=32, help="questions per step")
    add("--micro_batch_size", type=int, help="questions per forward; default: all of a step")
    add("--seed", type=int, default=0)
    add("--device", choices=DEVICES, default="auto")
    arguments = parser.parse_args(argv)
    with reported_errors(parser):
        run(arguments)


def run(arguments: Any) -> None:
    """Train as the command line says, and save the model."""
    names = ("lora_rank", "steps", "batch_size", "micro_batch_size")
    third_party(arguments.optimizer, arguments.optimizer_args)  # checks both
    at_least(1, **{name: getattr(arguments, name) for name in names})
    at_least(0, seed=arguments.seed)
    questions = read_questions(arguments.data, arguments.question_key, arguments.answer_key)
    model, tokenizer = load(arguments.model)
    examples = encode(questions, tokenizer, context_length(model))
    settings = Settings(
        dopr=dopr_settings(arguments.dopr, arguments.gamma, arguments.fresh_mean),
        **{name: getattr(arguments, name) for name in (*names, *OPTIMIZER, "seed")},
    )
    model.to(pick_device(arguments.device))
    model, _ = finetune(model, examples, settings, padding_id(tokenizer))
    save(model, tokenizer, arguments.out)
    print(f"saved {arguments.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
