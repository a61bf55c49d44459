"""What a study says at each optimizer's own temperature, as eval.temperature graded it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.analysis import (
    AnalysisError,
    Compared,
    Record,
    Row,
    by_variant,
    grouped,
    is_control,
    leaderboard,
    log_error,
    versus,
)

FILE = "temperature.jsonl"  # in a study's folder


@dataclass(frozen=True)
class Tempered:
    """One optimizer at its own temperature."""

    row: Row  # `versus_base`: the base has its own rate and temperature
    temperature: float
    all_else_equal: Compared | None  # the base at the variant's rate and temperature


def load(study: Path) -> list[Record]:
    """The records of temperature.jsonl; none if there is none. AnalysisError: not JSON."""
    path = study / FILE
    try:
        return [*map(json.loads, path.read_text().splitlines())] if path.exists() else []
    except json.JSONDecodeError as error:
        raise AnalysisError(f"{path}: not JSON, a record of it ({error})") from None


def ranked(records: list[Record]) -> list[Tempered]:
    """The optimizers, best first. records: of one study's temperature.jsonl."""
    bases = grouped(filter(is_control, records), alike)
    own = by_variant(record for record in records if not is_control(record))
    return [_tempered(row, own[row.variant], bases) for row in leaderboard(records)]


def _tempered(row: Row, own: list[Record], bases: dict[Any, list[Record]]) -> Tempered:
    base = [] if row.variant == row.base else bases.get(alike(own[0]), [])
    return Tempered(row, own[0]["temperature"], versus(own, base, log_error))


def alike(record: Record) -> tuple[str, float, float]:
    """The same for a variant and for its base at the variant's rate and temperature."""
    return record["base"], record["lr"], record["temperature"]


def check(study: Path, tempered: Iterable[Record], records: Iterable[Record]) -> None:
    """AnalysisError if models at their temperatures are not those of the study's records."""
    models = {_model(record) for record in records}
    if other := {record["variant"] for record in tempered if _model(record) not in models}:
        raise AnalysisError(
            f"{study / FILE}: {', '.join(sorted(other))} is not the model of "
            f"records.jsonl; run `python -m eval.temperature {study}` again, or delete the file"
        )


def _model(record: Record) -> tuple[Any, ...]:
    weights = (record.get("grading") or {}).get("checkpoint")
    return record["variant"], record["lr"], record["seed"], weights
