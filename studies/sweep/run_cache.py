"""Store the record of each run in its folder, and reuse it only for a run with equal settings.

A record contains everything that was asked of its run, so that no run is repeated and none is
mistaken for another.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.schema import OpenSchema
from eval.rollout.record import write_record
from optim.legacy_names import renamed_settings
from studies.stats.records import read_object
from trainer.presets import READERS
from trainer.settings import FIELDS, RUN_ONLY

GRADING = "grading "  # prefix of the keys of `asked` that determine the grade, not the model
DELETE = "delete the folder of the run or choose another --out"
RETIRED = {"deterministic": False, "ns_steps": 5}  # former settings, with the values all runs have
FORMER = {"ns_dtype": "bfloat16"}  # what a record without the setting had, if not the default


class TrialError(ValueError):
    """A run failed without diverging, or its folder contains another run or a damaged file."""


class CachedRecord(OpenSchema):
    """The required key of a record.json: every setting that determines the record."""

    asked: dict[str, Any]


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
    `asked`, or a damaged file.
    """
    asked = json.loads(json.dumps(asked))
    record, found = None, asked
    if (folder / "record.json").exists():
        record = read_record(folder)
        found = record["asked"]
    elif (folder / "config.json").exists():  # train.py began the run
        found = model_only(read_settings(folder))
    changes = differences(found, asked)
    trained = [f"{key} {change}" for key, change in changes.items() if not key.startswith(GRADING)]
    if trained:
        raise TrialError(f"{folder} holds another run: {'; '.join(trained)}; {DELETE}")
    return None if changes else record


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a finished run. Raises TrialError if the file is damaged."""
    return read_object(folder / "record.json", CachedRecord, DELETE, TrialError)


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of a run of train.py. Raises TrialError if the file is damaged."""
    return read_object(folder / "config.json", OpenSchema, DELETE, TrialError)


def differences(found: dict[str, Any], asked: dict[str, Any]) -> dict[str, str]:
    """Return the settings of a run on disk that differ from `asked`, as {key: "was .., is .."}.

    Names of earlier releases are translated, and settings that do not change the model are left
    out. A setting that one side lacks, because train.py did not have it at that time, has its
    default, or what it had then.
    """
    found, _ = renamed_settings(found)
    default = {key: field.default for key, field in FIELDS.items()} | RETIRED
    reads = [key for key in FORMER if found.get("optimizer") in READERS[key]]
    found = {key: FORMER[key] for key in reads} | found
    pairs = {
        key: (found.get(key, default.get(key)), asked.get(key, default.get(key)))
        for key in sorted((found.keys() | asked.keys()) - RUN_ONLY)
    }
    return {key: f"was {was}, is {now}" for key, (was, now) in pairs.items() if was != now}


def model_only(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that determine the model, without those of the process that runs it."""
    return {key: value for key, value in settings.items() if key not in RUN_ONLY}
