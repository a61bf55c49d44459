"""Read the folders that a report is about: studies and graded runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from studies.stats import temperatures
from studies.stats.records import (
    RECORDS,
    AnalysisError,
    Record,
    StudyProtocol,
    load_records,
    read_object,
    stored,
)


@dataclass
class Source:
    """The contents of the folders."""

    records: list[Record] = field(default_factory=list)
    at_temperatures: list[Record] = field(default_factory=list)  # each optimizer at its own
    protocols: list[dict[str, Any]] = field(default_factory=list)  # of the studies


def read(folders: Sequence[Path]) -> Source:
    """Read all folders. Raises AnalysisError if a file is missing or does not fit its schema."""
    source = Source()
    for folder in folders:
        records = load_records([folder])
        if not records:
            raise AnalysisError(
                f"{folder}: {RECORDS} has no records; run `python -m studies.sweep.compare`"
            )
        if stored(folder / RECORDS):
            path, advice = folder / "protocol.json", "the command of the study writes it"
            source.protocols.append(read_object(path, StudyProtocol, advice))
        source.records += records
        source.at_temperatures += temperatures.load(folder, records)
    return source
