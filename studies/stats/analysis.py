"""What a set of graded models says: leaderboard, curves over seeds, sweeps.

A record is one graded model (see eval/rollout/record.py). Only fresh records, on seeds that nothing was
tuned on, enter the leaderboard; records of single runs stand for themselves.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from eval.rollout.intervals import Estimate
from studies.stats.seeds import Paired, over_seeds, paired

Record = dict[str, Any]


class AnalysisError(ValueError):
    """Nothing to analyse, or something that is no record."""


@dataclass(frozen=True)
class Compared(Paired):
    """A variant against its base over the seeds of both; a diverged run loses its pair.

    The difference, its interval and p are over the pairs of which both runs finished.
    """

    n_lost: int  # pairs in which the variant diverged
    n_base_lost: int  # in which its base did


@dataclass(frozen=True)
class LeaderboardRow:
    """One optimizer on a leaderboard."""

    variant: str
    base: str
    lr: float
    val_loss: Estimate  # nats per scored token
    primary: Estimate
    median: float  # of the primary metric over seeds, which one outlier does not move
    mean_log_error: float  # what orders the leaderboard
    versus_base: Compared | None  # log error, paired over seeds; None for a base
    at_this_rate: Compared | None  # the same against the base at the variant's own learning rate
    val_versus_base: Compared | None  # nats
    n_diverged: int
    n_missing: int  # seeds that others have


def load_records(paths: Iterable[Path]) -> list[Record]:
    """Records of study folders (records.jsonl) and of graded runs (ttf/*.json, the last step).

    Raises AnalysisError for a folder that has neither, or something that is no JSON.
    """
    records: list[Record] = []
    for path in paths:
        study, graded = path / "records.jsonl", sorted((path / "ttf").glob("step-*.json"))
        if not study.exists() and not graded:
            raise AnalysisError(
                f"{path}: neither records.jsonl nor ttf/; grade runs with `python -m eval.rollout.ttf`, "
                "or run `python -m studies.sweep.compare`"
            )
        lines = study.read_text().splitlines() if study.exists() else _last(graded)
        records += parsed(path, lines)
    return records


def parsed(path: Path, lines: Iterable[str]) -> list[Record]:
    """A record a line. AnalysisError: no JSON."""
    try:
        return [*map(json.loads, lines)]
    except json.JSONDecodeError as error:
        raise AnalysisError(f"{path}: not JSON, a record of it ({error})") from None


def _last(graded: list[Path]) -> list[str]:
    """The records of the last step: of the weights, of their average, or of both."""
    step = graded[-1].stem.removesuffix("-ema")
    return [each.read_text() for each in graded if each.stem.removesuffix("-ema") == step]


def groups(records: Iterable[Record]) -> dict[tuple[str, int], list[Record]]:
    """Records that may be compared: the same task and training length."""
    return dict(sorted(grouped(records, itemgetter("task", "steps")).items()))


def primary(record: Record) -> float:
    """The metric that ranks; NaN for a run that diverged."""
    grade = record["grade"]
    value = grade and grade["metrics"][record["primary"]]["mean"]
    return math.nan if value is None else value


def is_finished(record: Record) -> bool:
    """Whether the run did not diverge."""
    return math.isfinite(primary(record))


def log_error(record: Record) -> float:
    """Logarithm of the rollout error; differences are logarithms of ratios. NaN if it diverged.

    The error of a success is its complement. A metric whose name begins with log10_ is a logarithm
    already. No error in n episodes counts as half of one in n + 1.
    """
    value = primary(record)
    if record["primary"].startswith("log10_"):
        return value * math.log(10)
    error = 1 - value if record["higher_is_better"] else value
    if error == 0:
        error = half_an_episode(record)
    return math.log(error) if error > 0 else math.nan


def half_an_episode(record: Record) -> float:
    """The share that counts for none in n episodes: half of one in n + 1."""
    return 0.5 / (record["grade"]["metrics"][record["primary"]]["n"] + 1)


def val_loss(record: Record) -> float:
    return math.nan if record["val_loss"] is None else record["val_loss"]


def teacher_forced(record: Record) -> float:
    """The error on the data's contexts: oracle KL where there is an oracle, else validation loss.

    A seed draws the task's instance, and instances differ in entropy: their losses do not compare.
    """
    grade = record["grade"] or {"metrics": {}}
    value = grade["metrics"].get("val_kl", {"mean": record["val_loss"]})["mean"]
    return math.nan if value is None else value


def is_control(record: Record) -> bool:
    """A base at the learning rate of one of its variants, on a fresh seed."""
    return record["role"] == "control"


def is_reported(record: Record) -> bool:
    return record["role"] in ("fresh", "single")


def references(records: list[Record]) -> dict[str, tuple[Estimate, Estimate]]:
    """Validation loss and primary metric over seeds of the rows that no optimizer made."""
    rows = by_variant(record for record in records if record["role"] == "reference")
    return {
        name: (over_seeds([*map(val_loss, runs)]), over_seeds([*map(primary, runs)]))
        for name, own in rows.items()
        if (runs := {record["seed"]: record for record in own}.values())  # of several folders
    }


def leaderboard(records: list[Record]) -> list[LeaderboardRow]:
    """One row a variant, best first: by mean `log_error`, since errors are compared as ratios.

    A variant with a diverged run is last, whatever the others; before it stands what lacks seeds
    of others, since a seed draws another instance of the task.
    """
    runs = by_variant(filter(is_reported, records))
    n_seeds = len({record["seed"] for own in runs.values() for record in own})
    controls = grouped(filter(is_control, records), itemgetter("variant", "lr"))
    rows = []
    for own in runs.values():
        name, lr = own[0]["base"], own[0]["lr"]
        base = runs.get(name, [])
        at_this_rate = [record for record in base if record["lr"] == lr]
        rows.append(_row(own, base, at_this_rate or controls.get((name, lr), []), n_seeds))
    return sorted(rows, key=lambda row: (row.n_diverged, row.n_missing, row.mean_log_error))


def _row(
    own: list[Record], base: list[Record], at_this_rate: list[Record], n_seeds: int
) -> LeaderboardRow:
    first = own[0]
    finished = [record for record in own if is_finished(record)]
    is_base = first["variant"] == first["base"]
    values = [primary(record) for record in finished]
    return LeaderboardRow(
        variant=first["variant"],
        base=first["base"],
        lr=first["lr"],
        val_loss=over_seeds([val_loss(record) for record in finished]),
        primary=over_seeds(values),
        median=float(np.median(values)) if values else math.nan,
        mean_log_error=over_seeds([log_error(record) for record in finished]).mean,
        versus_base=None if is_base else versus(own, base, log_error),
        at_this_rate=None if is_base else versus(own, at_this_rate, log_error),
        val_versus_base=None if is_base else versus(own, base, val_loss),
        n_diverged=len(own) - len(finished),
        n_missing=n_seeds - len({record["seed"] for record in own}),
    )


def versus(
    own: list[Record], base: list[Record], value: Callable[[Record], float]
) -> Compared | None:
    """`own` against `base`, paired over the seeds of both, lower is better; None if none is."""
    ours, theirs = (
        {r["seed"]: value(r) if math.isfinite(value(r)) else math.inf for r in records}
        for records in (own, base)
    )
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    if not pairs:
        return None
    finished = [pair for pair in pairs if all(map(math.isfinite, pair))]
    a, b = zip(*finished, strict=True) if finished else ((), ())
    lost, base_lost = (sum(map(math.isinf, runs)) for runs in zip(*pairs, strict=True))
    found = replace(paired(a, b), wins=sum(x < y for x, y in pairs), n_pairs=len(pairs))
    return Compared(**vars(found), n_lost=lost, n_base_lost=base_lost)


def seed_curves(
    records: list[Record], name: str
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Mean and t-interval over seeds, (H,) each, of one curve of each variant.

    A single run has no spread over seeds: it keeps its own interval over episodes.
    """
    return {
        variant: _over_runs([record["grade"]["curves"][name] for record in own])
        for variant, own in by_variant(filter(is_reported, records)).items()
        if all(record["grade"] and name in record["grade"]["curves"] for record in own)
    }


def _over_runs(curves: list[dict[str, list[float]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if len(curves) == 1:
        mean, lo, hi = (np.array(curves[0][key], dtype=float) for key in ("mean", "lo", "hi"))
        return mean, lo, hi
    columns = np.array([each["mean"] for each in curves], dtype=float).T  # (H, seeds)
    estimates = [over_seeds(column.tolist()) for column in columns]
    mean, lo, hi = np.array([(each.mean, each.lo, each.hi) for each in estimates]).T
    return mean, lo, hi


def sweeps(records: list[Record]) -> dict[str, list[tuple[float, float, float]]]:
    """(lr, val_loss, primary) of every variant's tuning runs, averaged over seeds, by lr."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for variant, own in by_variant(r for r in records if r["role"] == "tuning").items():
        rates = sorted({record["lr"] for record in own})
        at = {lr: [record for record in own if record["lr"] == lr] for lr in rates}
        found[variant] = [(lr, _mean(val_loss, at[lr]), _mean(primary, at[lr])) for lr in rates]
    return found


def _mean(value: Callable[[Record], float], records: list[Record]) -> float:
    return float(np.mean([*map(value, records)]))


def by_variant(records: Iterable[Record]) -> dict[str, list[Record]]:
    return grouped(records, itemgetter("variant"))


def grouped(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """The records of each value of `key`, in order of appearance."""
    found: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        found[key(record)].append(record)
    return dict(found)
