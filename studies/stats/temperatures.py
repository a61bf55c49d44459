"""Compare optimizers at their own temperatures, as studies.sweep.temperature graded them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.stats.analysis import Compared, LeaderboardRow, leaderboard, versus
from studies.stats.records import (
    AnalysisError,
    Record,
    by_variant,
    grouped,
    is_control,
    log_error,
    read_records,
)

FILE = "temperature.jsonl"  # in a study's folder
REQUIRED = (  # keys of a record
    *("spec", "steps", "variant", "base", "role", "lr", "seed", "primary", "grade"),
    "temperature",
)


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
    path = study / FILE
    found = read_records(path)
    if problem := _problem(found, records):
        raise AnalysisError(
            f"{path}: {problem}; run `python -m studies.sweep.temperature {study}` again, or "
            "delete the file"
        )
    return found


def _problem(found: list[Record], records: Iterable[Record]) -> str:
    """Describe the first problem of a temperature.jsonl; empty if there is none."""
    for number, record in enumerate(found, start=1):
        if missing := [key for key in REQUIRED if key not in record]:
            return f"record {number} lacks {', '.join(missing)}"
    graded_models = {_graded_model(record) for record in records}
    strange = {record["variant"] for record in found if _graded_model(record) not in graded_models}
    return f"{', '.join(sorted(strange))} is not the model of records.jsonl" if strange else ""


def _graded_model(record: Record) -> tuple[Any, ...]:
    """Return a key of the model and of the episodes that it was graded on."""
    grading = record.get("grading") or {}
    how = (grading.get(key) for key in ("checkpoint", "n", "seed"))
    return record["variant"], record["lr"], record["seed"], *how


def ranked(records: list[Record]) -> list[TemperatureRow]:
    """Rank the optimizers of one study's temperature.jsonl, best first."""
    bases = grouped(filter(is_control, records), conditions)
    own = by_variant(record for record in records if not is_control(record))
    return [_temperature_row(row, own[row.variant], bases) for row in leaderboard(records)]


def _temperature_row(
    row: LeaderboardRow, own: list[Record], bases: dict[Any, list[Record]]
) -> TemperatureRow:
    base = [] if row.variant == row.base else bases.get(conditions(own[0]), [])
    return TemperatureRow(row, own[0]["temperature"], versus(own, base, log_error))


def conditions(record: Record) -> tuple[str, float, float]:
    """Return a key that a variant shares with its base at the variant's rate and temperature."""
    return record["base"], record["lr"], record["temperature"]
