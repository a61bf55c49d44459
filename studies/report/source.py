"""Read the folders that a report is about: studies and graded runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from studies.stats import temperatures
from studies.stats.records import RECORDS, AnalysisError, Record, load_records, stored

REQUIRED = (  # keys of a record; the other keys are optional
    *("task", "spec", "primary", "higher_is_better", "variant", "base", "role", "lr", "seed"),
    *("steps", "tokens", "val_loss", "grade", "command", "environment", "seconds", "settings"),
)


@dataclass
class Source:
    """The contents of the folders."""

    records: list[Record] = field(default_factory=list)
    at_temperatures: list[Record] = field(default_factory=list)  # each optimizer at its own
    protocols: list[dict[str, Any]] = field(default_factory=list)  # of the studies


def read(folders: Sequence[Path]) -> Source:
    """Read all folders. Raises AnalysisError if a file is missing or is not what it should be."""
    source = Source()
    for folder in folders:
        records = load_records([folder])
        if stored(folder / RECORDS):
            source.protocols.append(_read_protocol(folder / "protocol.json"))
        _check(folder, records)
        source.records += records
        source.at_temperatures += temperatures.load(folder, records)
    return source


def _read_protocol(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise AnalysisError(f"{path}: missing; it describes what the study planned") from None
    except json.JSONDecodeError as error:
        raise AnalysisError(f"{path}: expected JSON ({error})") from None


def _check(folder: Path, records: list[Record]) -> None:
    if not records:
        raise AnalysisError(
            f"{folder}: {RECORDS} has no records; run `python -m studies.sweep.compare`"
        )
    for number, record in enumerate(records, start=1):
        if missing := [key for key in REQUIRED if key not in record]:
            raise AnalysisError(
                f"{folder}: record {number} lacks {', '.join(missing)}; grade the run again"
            )
