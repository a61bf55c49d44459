"""Store the record of each run in its folder, and reuse it only for a run with equal settings.

A record contains everything that was asked of its run, so that no run is repeated and none is
mistaken for another.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval.rollout.record import write_record
from optim.legacy_names import renamed_settings
from trainer.settings import FIELDS, RUN_ONLY

GRADING = "grading "  # prefix of the keys of `asked` that determine the grade, not the model
RETIRED = {"deterministic": False, "ns_steps": 5}  # former settings, with the values all runs have


class TrialError(RuntimeError):
    """A run failed for a reason other than divergence, or its folder contains another run."""


def recorded(
    folder: Path, asked: dict[str, Any], make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return the record in a folder; call `make` and store its result if there is none.

    Raises TrialError if the folder contains a run whose settings differ from `asked`.
    """
    if found := finished(folder, asked):
        return found
    started = time.perf_counter()
    record = make() | {"asked": asked}
    record["seconds"] = time.perf_counter() - started
    write_record(folder / "record.json", record)
    return read_record(folder)


def finished(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record in a folder; None if there is none or its model must be graded again.

    Raises TrialError if the folder contains a run, finished or not, whose settings differ from
    `asked`.
    """
    asked = json.loads(json.dumps(asked))
    record = read_record(folder) if (folder / "record.json").exists() else None
    changes = differences(record["asked"] if record else _begun(folder) or asked, asked)
    _check_trained_the_same(folder, changes)
    return None if changes else record


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a finished run."""
    return json.loads((folder / "record.json").read_text())


def _begun(folder: Path) -> dict[str, Any]:
    """Return the model settings of a run that train.py began in a folder; empty without one."""
    path = folder / "config.json"
    return model_only(json.loads(path.read_text())) if path.exists() else {}


def differences(found: dict[str, Any], asked: dict[str, Any]) -> dict[str, str]:
    """Return the settings of a run on disk that differ from `asked`, as {key: "was .., is .."}.

    Names of earlier releases are translated. A setting that one side lacks, because train.py did
    not have it at that time, has its default.
    """
    found, _ = renamed_settings(found)
    default = {key: field.default for key, field in FIELDS.items()} | RETIRED
    pairs = {
        key: (found.get(key, default.get(key)), asked.get(key, default.get(key)))
        for key in sorted(found.keys() | asked.keys())
    }
    return {key: f"was {was}, is {now}" for key, (was, now) in pairs.items() if was != now}


def _check_trained_the_same(folder: Path, changes: dict[str, str]) -> None:
    """Raise TrialError if a difference concerns the model and not only its grade."""
    trained = [f"{key} {change}" for key, change in changes.items() if not key.startswith(GRADING)]
    if trained:
        raise TrialError(
            f"{folder} holds another run: {'; '.join(trained)}; delete it or choose another --out"
        )


def model_only(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that determine the model, without those that say how the run is run."""
    return {key: value for key, value in settings.items() if key not in RUN_ONLY}
