"""What a run leaves in its folder, and when that may stand for what is asked now.

A run is never made twice, and never taken for another: a record holds all that was asked of it.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval.rollout.record import write_record
from trainer.settings import FIELDS, RUN_ONLY

GRADING = "grading "  # how keys of `asked` begin that make the grade, not the model


class TrialError(RuntimeError):
    """A run that failed for another reason than divergence, or is not the one asked for."""


def recorded(
    folder: Path, asked: dict[str, Any], make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The record in a folder, which `make` makes unless it is there.

    Raises PointError if what is there was trained with other settings than `asked`.
    """
    if found := finished(folder, asked):
        return found
    started = time.perf_counter()
    record = make() | {"asked": asked}
    record["seconds"] = time.perf_counter() - started
    write_record(folder / "record.json", record)
    return read_record(folder)


def finished(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The record in a folder; None if there is none, or if its model is to be graded again.

    Raises PointError if it, or a run that was stopped there, is another than that asked for.
    """
    asked = json.loads(json.dumps(asked))
    record = read_record(folder) if (folder / "record.json").exists() else None
    other = differences(record["asked"] if record else _begun(folder) or asked, asked)
    _check_trained_the_same(folder, other)
    return None if other else record


def read_record(folder: Path) -> dict[str, Any]:
    """What a finished point left."""
    return json.loads((folder / "record.json").read_text())


def _begun(folder: Path) -> dict[str, Any]:
    """What makes the model that train.py began in a folder; empty if there is none."""
    path = folder / "config.json"
    return of_the_model(json.loads(path.read_text())) if path.exists() else {}


def differences(found: dict[str, Any], asked: dict[str, Any]) -> dict[str, str]:
    """What was asked of a run on disk and is not asked now, or not so: {key: "was .., is .."}.

    A setting that one side does not have, because train.py had none of it then, has its default.
    """
    default = {key: field.default for key, field in FIELDS.items()}
    pairs = {
        key: (found.get(key, default.get(key)), asked.get(key, default.get(key)))
        for key in sorted(found.keys() | asked.keys())
    }
    return {key: f"was {was}, is {now}" for key, (was, now) in pairs.items() if was != now}


def _check_trained_the_same(folder: Path, other: dict[str, str]) -> None:
    """PointError if the differences of what is in a folder are not of its grading only."""
    trained = [f"{key} {change}" for key, change in other.items() if not key.startswith(GRADING)]
    if trained:
        was = "; ".join(trained)
        raise TrialError(f"{folder} holds another run: {was}; delete it or choose another --out")


def of_the_model(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that make the model, without those that only say how it is run."""
    return {key: value for key, value in settings.items() if key not in RUN_ONLY}
