"""Compare optimizers at their own temperatures, as studies.sweep.temperature graded them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.stats.analysis import Compared, LeaderboardRow, leaderboard, versus
from studies.stats.errors import log_error
from studies.stats.records import (
    AnalysisError,
    Record,
    StudyRecord,
    by_variant,
    grouped,
    is_control,
    read_records,
)

FILE = "temperature.jsonl"  # in a study's folder


class TemperatureRecord(StudyRecord):
    """The required keys of a record of temperature.jsonl."""

    temperature: float


@dataclass(frozen=True)
class TemperatureRow:
    """One optimizer at its own temperature."""

    row: LeaderboardRow  # `versus_base`: the base has its own rate and temperature
    temperature: float
    all_else_equal: Compared | None  # the base at the variant's rate and temperature


def load(study: Path, records: Iterable[Record]) -> list[Record]:
    """Load temperature.jsonl from a study's folder; return an empty list if it does not exist.

    Args:
        study: the folder.
        records: the records of the study.
    Raises:
        AnalysisError: studies.sweep.temperature did not write the file, or its models or episodes
            are not those of the study.
    """
    found = read_records(study / FILE, TemperatureRecord)
    graded_models = {_graded_model(record) for record in records}
    others = {record["variant"] for record in found if _graded_model(record) not in graded_models}
    if others:
        raise AnalysisError(
            f"{study / FILE}: {', '.join(sorted(others))} is not the model of records.jsonl; run "
            f"`python -m studies.sweep.temperature {study}` again, or delete the file"
        )
    return found


def _graded_model(record: Record) -> tuple[Any, ...]:
    """Return a key of the model and of the episodes that it was graded on."""
    grading = record.get("grading") or {}
    how = (grading.get(key) for key in ("checkpoint", "n", "seed"))
    return record["variant"], record["lr"], record["seed"], *how


def ranked(records: list[Record]) -> list[TemperatureRow]:
    """Rank the optimizers of one study's temperature.jsonl, best first."""
    bases = grouped(filter(is_control, records), conditions)
    runs = by_variant(record for record in records if not is_control(record))
    rows = []
    for row in leaderboard(records):
        own = runs[row.variant]
        base = [] if row.variant == row.base else bases.get(conditions(own[0]), [])
        rows.append(TemperatureRow(row, own[0]["temperature"], versus(own, base, log_error)))
    return rows


def conditions(record: Record) -> tuple[str, float, float]:
    """Return a key that a variant shares with its base at the variant's rate and temperature."""
    return record["base"], record["lr"], record["temperature"]
