"""Read the records of studies and of graded runs, and the quantities that the statistics need.

A record is one graded model, see eval/rollout/record.py. A study writes its records as JSON lines;
the committed results hold the same lines compressed with xz.
"""

import lzma
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, model_validator

from data.schema import OpenSchema, checked_json, read_checked_json
from data.shards import DataError
from studies.stats.errors import Record, error_of_metric, primary

RECORDS = "records.jsonl"  # in a study's folder


class AnalysisError(ValueError):
    """The files contain no records, or records that cannot be analysed together."""


class Metric(OpenSchema):
    """A mean over n episodes with its interval; null is not finite."""

    mean: float | None
    lo: float | None
    hi: float | None
    n: int


class Curve(OpenSchema):
    """A mean along a rollout with its interval."""

    mean: list[float | None]
    lo: list[float | None]
    hi: list[float | None]


class RecordedGrade(OpenSchema):
    """The grade of a model that did not diverge."""

    metrics: dict[str, Metric]
    curves: dict[str, Curve]
    n_t: dict[str, list[int]]
    samples: list[dict[str, str]]


class StudyRecord(OpenSchema):
    """The required keys of a record."""

    task: str
    spec: str
    primary: str
    higher_is_better: bool
    variant: str
    base: str
    role: str
    lr: float
    seed: int
    steps: int
    tokens: int
    val_loss: float | None
    grade: RecordedGrade | None
    command: str
    environment: dict[str, Any]
    seconds: float
    settings: dict[str, Any]

    @model_validator(mode="after")
    def _has_primary(self) -> "StudyRecord":
        if self.grade and self.primary not in self.grade.metrics:
            raise ValueError(f"the grade has no metric {self.primary!r}, which ranks")
        error = error_of_metric(self.primary, higher_is_better=self.higher_is_better).source
        if self.grade and error not in self.grade.metrics:
            raise ValueError(f"the grade has no metric {error!r}, the error of {self.primary}")
        return self


class StudyProtocol(OpenSchema):
    """The required keys of a study's protocol.json."""

    command: str
    spec: str
    steps: int
    variants: dict[str, dict[str, Any]]
    fresh_seeds: list[int]


def stored(path: Path) -> Path | None:
    """Return `path` if it exists, else `path`.xz if that exists, else None."""
    candidates = (path, path.with_name(f"{path.name}.xz"))
    return next((each for each in candidates if each.exists()), None)


def read_object(
    path: Path, schema: type[BaseModel], advice: str, error: type[Exception] = AnalysisError
) -> Record:
    """Return a JSON object that has to fit `schema`, with the keys that the schema lacks.

    Raises `error`, which ends with `advice`, if the file cannot be read or does not fit.
    """
    try:
        return read_checked_json(path, schema)[1]
    except DataError as problem:
        raise error(f"{problem}; {advice}") from None


def read_records(path: Path, schema: type[BaseModel] = StudyRecord) -> list[Record]:
    """Return the records of a JSON-lines file, or of its compressed copy `path`.xz.

    Returns an empty list if neither exists. Raises AnalysisError if the file cannot be read or if a
    line does not fit `schema`.
    """
    if not (found := stored(path)):
        return []
    try:
        content = found.read_bytes()
        lines = (lzma.decompress(content) if found.suffix == ".xz" else content).splitlines()
    except (OSError, lzma.LZMAError) as error:
        raise AnalysisError(f"{found}: cannot be read ({error})") from None
    try:
        return [
            checked_json(line, f"{found}, line {number}", schema)[1]
            for number, line in enumerate(lines, start=1)
        ]
    except DataError as problem:
        advice = "delete this line, and run the command that wrote it again"
        raise AnalysisError(f"{problem}; {advice}") from None


def load_records(folders: Iterable[Path]) -> list[Record]:
    """Load the records of studies (records.jsonl) and of graded runs (ttf/*.json, the last step).

    Raises AnalysisError if a folder contains neither, or as `read_records`.
    """
    records: list[Record] = []
    for folder in folders:
        graded = sorted((folder / "ttf").glob("step-*.json"))
        if stored(folder / RECORDS):
            records += read_records(folder / RECORDS)
        elif graded:
            records += [record for path in _last_step(graded) for record in read_records(path)]
        else:
            raise AnalysisError(
                f"{folder}: contains neither {RECORDS} nor ttf/; grade a run with "
                "`python -m eval.rollout.ttf`, or run `python -m studies.sweep.compare`"
            )
    return records


def _last_step(graded: list[Path]) -> list[Path]:
    """Return the grades of the last step: of the weights, of their average, or of both."""
    step = graded[-1].stem.removesuffix("-ema")
    return [path for path in graded if path.stem.removesuffix("-ema") == step]


def grouped(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """Group the records by the value of `key`, in order of appearance."""
    groups: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return dict(groups)


def by_variant(records: Iterable[Record]) -> dict[str, list[Record]]:
    return grouped(records, itemgetter("variant"))


def is_reported(record: Record) -> bool:
    """Whether the run enters a leaderboard: a fresh run of a study, or a single run."""
    return record["role"] in ("fresh", "single")


def is_control(record: Record) -> bool:
    """Whether the run is a base optimizer at the learning rate of one of its variants."""
    return record["role"] == "control"


def is_finished(record: Record) -> bool:
    """Whether the run did not diverge."""
    return math.isfinite(primary(record))


def val_loss(record: Record) -> float:
    """Return the validation loss in nats per scored token; NaN if the run diverged."""
    return math.nan if record["val_loss"] is None else record["val_loss"]


def teacher_forced(record: Record) -> float:
    """Return the error on the data's contexts; NaN if the run diverged.

    It is the KL from the oracle if the task has an oracle, else the validation loss. Each seed
    draws an instance of the task, and the losses of two instances are not comparable, because their
    entropies differ.
    """
    grade = record["grade"] or {"metrics": {}}
    value = grade["metrics"].get("val_kl", {"mean": record["val_loss"]})["mean"]
    return math.nan if value is None else value
