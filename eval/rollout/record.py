"""Write records: one graded model with the facts needed to interpret its numbers, as JSON.

task, spec, primary, higher_is_better    the task and its ranking metric
variant, base, lr, seed, steps, tokens   the training; `variant` is compared with optimizer `base`
role                                     tuning | fresh | control | single (not part of a study) |
                                         reference (not a trained model; lr is 0)
val_loss                                 nats per scored token; null if the run diverged
grade                                    see eval/rollout/metrics.py; null if the run diverged;
                                         `stride`: steps between two points of its curves, if not 1
command, environment, seconds, settings  how to reproduce the model, and where it was trained
"""

import json
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import model_validator

from data.files import write_atomic
from data.schema import OpenSchema, read_checked_json
from eval.rollout.metrics import Grade
from eval.rollout.tasks.task import TaskBase
from trainer.presets import moot_settings
from trainer.settings import FIELDS, RUN_ONLY


class EstimateRow(OpenSchema):
    """An `Estimate`; the numbers that were not finite are null."""

    mean: float | None
    lo: float | None
    hi: float | None
    n: int


class GradeRow(OpenSchema):
    metrics: dict[str, EstimateRow]


class Record(OpenSchema):
    """The fields of a record that are read here; see above for the others."""

    task: str
    primary: str
    higher_is_better: bool
    variant: str
    steps: int
    val_loss: float | None
    settings: dict[str, Any]
    grading: dict[str, Any]
    grade: GradeRow

    @model_validator(mode="after")
    def _check_names(self) -> "Record":
        if self.primary not in self.grade.metrics:
            raise ValueError(f"grade.metrics lacks the primary metric {self.primary!r}")
        return self


def read_record(path: Path) -> dict[str, Any]:
    """Read one record of a graded checkpoint.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    try:
        return read_checked_json(path, Record, ValueError)[1]
    except ValueError as error:
        raise ValueError(f"{error}; delete the file to grade the checkpoint again") from None


def make_record(
    task: TaskBase, settings: dict[str, Any], *, steps: int, val_loss: float | None, **more: Any
) -> dict[str, Any]:
    """Build a record from the task and the run's settings; `more` provides the other fields."""
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
    """Return the command that repeats a run in the folder NEW; it omits default settings."""
    defaults = {key: field.default for key, field in FIELDS.items()}
    moot = moot_settings(defaults | config)  # train.py refuses them
    changed = {
        key: config[key]
        for key, default in defaults.items()
        if key not in RUN_ONLY and key not in moot and config.get(key, default) != default
    }
    flags = [f"--{key}={value}" for key, value in (changed | {"out_dir": "NEW"}).items()]
    return f"OMP_NUM_THREADS={threads} " + shlex.join(["python", "train.py", *flags])


def readable(grade: Grade, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """Convert a grade to JSON-compatible data, with its samples decoded to text."""
    content = grade.to_json()
    samples = [{key: decode(ids) for key, ids in sample.items()} for sample in grade.samples]
    return content | {"samples": samples}


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write one line of JSON per record, atomically."""
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in records))


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write one JSON object, atomically. NaN and infinite numbers become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(_finite(record), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
