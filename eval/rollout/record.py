"""A record: one graded model with everything that its numbers must be read with, as JSON.

task, spec, primary, higher_is_better    what it was graded on
variant, base, lr, seed, steps, tokens   how it was trained; `base` is what it is compared with
role                                     tuning | fresh | control | single (no part of a protocol) |
                                         reference (no optimizer made it; lr 0)
val_loss                                 nats per scored token; null: the run diverged
grade                                    see eval/rollout/metrics.py; null: the run diverged
command, environment, seconds, settings  how to make it again, and where it was made
"""

import json
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from eval.rollout.metrics import Grade
from eval.rollout.tasks.task import TaskBase
from trainer.checkpoint.read import write_atomic
from trainer.settings import FIELDS, RUN_ONLY


def make_record(
    task: TaskBase, settings: dict[str, Any], *, steps: int, val_loss: float | None, **more: Any
) -> dict[str, Any]:
    """The parts that follow from the task and the run's settings; `more` has all others."""
    base = settings["optimizer"]
    return {
        "task": task.name,
        "spec": task.spec,
        "primary": task.primary,
        "higher_is_better": task.higher_is_better,
        "variant": f"dopr-{base}" if settings["dopr"] else base,
        "base": base,
        "role": "single",
        "lr": settings["lr"],
        "seed": settings["seed"],
        "steps": steps,
        "tokens": steps * settings["batch_size"] * settings["block_size"],
        "val_loss": val_loss,
        "settings": settings,
        **more,
    }


def train_command(config: dict[str, Any], threads: int) -> str:
    """What makes the run again, in the folder NEW: all settings that are not at their defaults."""
    changed = {
        key: value
        for key, value in config.items()
        if key not in RUN_ONLY and (key not in FIELDS or value != FIELDS[key].default)
    }
    flags = [f"--{key}={value}" for key, value in (changed | {"out_dir": "NEW"}).items()]
    return f"OMP_NUM_THREADS={threads} " + shlex.join(["python", "train.py", *flags])


def readable(grade: Grade, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """A grade as JSON, its samples as text."""
    content = grade.to_json()
    samples = [{key: decode(ids) for key, ids in sample.items()} for sample in grade.samples]
    return content | {"samples": samples}


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """A line of JSON each, atomically."""
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in records))


def write_record(path: Path, record: dict[str, Any]) -> None:
    """One JSON object, atomically; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(_finite(record), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
