"""Say what nanoGPT's settings are called here, with the arithmetic where their meaning differs."""

from collections.abc import Callable, Mapping
from typing import Any

Given = Mapping[str, Any]  # the values of all settings that were given, by name, not yet checked

RENAMED = {
    "learning_rate": "lr",
    "max_iters": "max_steps",
    "warmup_iters": "warmup_steps",
    "eval_interval": "eval_every",
    "log_interval": "log_every",
}
DROPPED = {
    "lr_decay_iters": "the learning rate always decays until max_steps; remove it",
    "always_save_checkpoint": "every save_every steps a checkpoint is saved; remove it",
    "eval_only": "the command of a finished run evaluates it again; remove it",
    "wandb_run_name": "the name is the last part of out_dir; remove it",
}


def _number(given: Given, *keys: str) -> float | None:
    """Return the first of these settings that was given and is a number."""
    for key in keys:
        try:
            return float(given[key])
        except (KeyError, TypeError, ValueError):
            continue
    return None


def _decay_lr(given: Given) -> str:
    schedule = "cosine" if str(given["decay_lr"]).lower() == "true" else "constant"
    return f"write schedule={schedule}"


def _wandb_log(given: Given) -> str:
    return f"write wandb={'online' if str(given['wandb_log']).lower() == 'true' else 'off'}"


def _min_lr(given: Given) -> str:
    low, high = _number(given, "min_lr"), _number(given, "learning_rate", "lr")
    value = f" = {low / high:g}" if low is not None and high else ""
    return f"write min_lr_ratio = min_lr / lr{value}"


def _gradient_accumulation_steps(given: Given) -> str:
    micro, steps = _number(given, "batch_size"), _number(given, "gradient_accumulation_steps")
    value = f" = {micro * steps:g}" if micro is not None and steps is not None else ""
    return (
        "batch_size counts the sequences of a whole step here: write micro_batch_size = "
        f"nanoGPT's batch_size, and batch_size = nanoGPT's batch_size x "
        f"gradient_accumulation_steps{value}"
    )


def _eval_iters(given: Given) -> str:
    steps, n = _number(given, "gradient_accumulation_steps"), _number(given, "eval_iters")
    value = f" = {max(1, round(n / steps))}" if n is not None and steps else ""
    return (
        "write eval_batches, which counts batches of batch_size sequences: eval_iters / "
        f"gradient_accumulation_steps{value}; 0 is the whole validation set"
    )


COMPUTED: dict[str, Callable[[Given], str]] = {
    "decay_lr": _decay_lr,
    "wandb_log": _wandb_log,
    "min_lr": _min_lr,
    "gradient_accumulation_steps": _gradient_accumulation_steps,
    "eval_iters": _eval_iters,
}


def nanogpt_hint(key: str, given: Given) -> str:
    """Return what to write here for nanoGPT's setting `key`; "" if nanoGPT has no such setting."""
    if key in RENAMED:
        return f"nanoGPT's {key} is called {RENAMED[key]} here"
    if key in DROPPED:
        return f"nanoGPT's {key}: {DROPPED[key]}"
    return f"nanoGPT's {key}: {COMPUTED[key](given)}" if key in COMPUTED else ""
