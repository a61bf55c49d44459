"""What a study says at each optimizer's own temperature, as studies.sweep.temperature graded it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.stats.analysis import (
    AnalysisError,
    Compared,
    LeaderboardRow,
    Record,
    by_variant,
    grouped,
    is_control,
    leaderboard,
    log_error,
    parsed,
    versus,
)

FILE = "temperature.jsonl"  # in a study's folder
NEEDED = (  # of a record
    *("spec", "steps", "variant", "base", "role", "lr", "seed", "primary", "grade"),
    "temperature",
)


@dataclass(frozen=True)
class Tempered:
    """One optimizer at its own temperature."""

    row: LeaderboardRow  # `versus_base`: the base has its own rate and temperature
    temperature: float
    all_else_equal: Compared | None  # the base at the variant's rate and temperature


def load(study: Path, records: Iterable[Record]) -> list[Record]:
    """The records of temperature.jsonl; none if there is none. records: the study's.

    Raises AnalysisError for what studies.sweep.temperature did not write, and for models or episodes that
    are not those of the study.
    """
    path = study / FILE
    found = parsed(path, path.read_text().splitlines()) if path.exists() else []
    if problem := _problem(found, records):
        raise AnalysisError(
            f"{path}: {problem}; run `python -m studies.sweep.temperature {study}` again, or delete the file"
        )
    return found


def _problem(found: list[Record], records: Iterable[Record]) -> str:
    """What is wrong with the records of a temperature.jsonl; empty if nothing is."""
    for number, record in enumerate(found, start=1):
        if lacks := [key for key in NEEDED if key not in record]:
            return f"record {number} lacks {', '.join(lacks)}"
    models = {_model(record) for record in records}
    other = {record["variant"] for record in found if _model(record) not in models}
    return f"{', '.join(sorted(other))} is not the model of records.jsonl" if other else ""


def _model(record: Record) -> tuple[Any, ...]:
    """Which model it is, and on which episodes it was graded."""
    grading = record.get("grading") or {}
    how = (grading.get(key) for key in ("checkpoint", "n", "seed"))
    return record["variant"], record["lr"], record["seed"], *how


def ranked(records: list[Record]) -> list[Tempered]:
    """The optimizers, best first. records: of one study's temperature.jsonl."""
    bases = grouped(filter(is_control, records), alike)
    own = by_variant(record for record in records if not is_control(record))
    return [_tempered(row, own[row.variant], bases) for row in leaderboard(records)]


def _tempered(row: LeaderboardRow, own: list[Record], bases: dict[Any, list[Record]]) -> Tempered:
    base = [] if row.variant == row.base else bases.get(alike(own[0]), [])
    return Tempered(row, own[0]["temperature"], versus(own, base, log_error))


def alike(record: Record) -> tuple[str, float, float]:
    """The same for a variant and for its base at the variant's rate and temperature."""
    return record["base"], record["lr"], record["temperature"]
