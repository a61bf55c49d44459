"""Format the leaderboard of a report: one entry for each optimizer, compared with its base."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from eval.rollout.intervals import MIN_SEEDS, Estimate
from studies.report.format import NONE, Cell, number, p_value, pair, times, verdict
from studies.stats.analysis import LeaderboardRow, leaderboard
from studies.stats.records import Record, is_finished, is_reported

BAR = 100  # width of the drawing of an interval; the middle means no difference
CLEAR = ("better", "worse")  # verdicts
CLIP = 4  # a drawing shows differences up to this multiple of the median one


@dataclass(frozen=True)
class Versus:
    """A variant against its base."""

    error: Cell  # ratio of the rollout errors
    at_this_rate: Cell  # the same with the base at the variant's learning rate
    val_loss: Cell  # difference, nats
    wins: str  # "4/5"
    p: str
    is_strict: bool  # a clear verdict at both rates, and p below the family's threshold
    verdict: str  # studies.report.format.verdict
    bar: tuple[float, float, float] | None  # low end, mean and high end, 0 to BAR


@dataclass(frozen=True)
class Entry:
    """One line of the leaderboard."""

    variant: str
    base: str
    lr: str
    val_loss: Cell
    primary: Cell
    median: str
    versus: Versus | None
    diverged: int
    n_runs: int
    is_best: bool  # better than every other variant by a paired interval


def entries(records: list[Record], *, is_study: bool, threshold: float) -> list[Entry]:
    """Return the leaderboard, best first; variants of which no run finished come last."""
    reported = [record for record in records if is_reported(record)]
    finished = {r["variant"] for r in reported if is_finished(r)}
    rows = leaderboard([r for r in records if r["variant"] in finished])
    best = clear_best(reported, rows)
    scale = _scale(rows)
    found = [_entry(row, scale, threshold, row.variant == best) for row in rows]
    if not is_study:
        found = [_over_episodes(entry, reported) for entry in found]
    lost = sorted({r["variant"] for r in reported} - finished)
    return found + [_lost(name, [r for r in reported if r["variant"] == name]) for name in lost]


def clear_best(records: list[Record], rows: list[LeaderboardRow]) -> str | None:
    """Return the first variant if its paired interval against each other one excludes zero."""
    if len(rows) < 2 or rows[0].n_diverged:
        return None
    names = {row.variant for row in rows}
    against = [r | {"base": rows[0].variant} for r in records if r["variant"] in names]
    compared = [row.versus_base for row in leaderboard(against) if row.variant != rows[0].variant]
    is_worse = [each and each.difference.lo > 0 for each in compared]
    return rows[0].variant if all(is_worse) else None


def _entry(row: LeaderboardRow, scale: float, threshold: float, is_best: bool) -> Entry:
    versus, val = row.versus_base, row.val_versus_base
    found = verdict(versus, row.at_this_rate) if versus else ""
    is_controlled = row.at_this_rate is not None and row.at_this_rate.difference.n >= MIN_SEEDS
    shown = versus and Versus(
        error=times(versus.difference),
        at_this_rate=times(row.at_this_rate.difference) if row.at_this_rate else (NONE, ""),
        val_loss=pair(val.difference, sign=True) if val else (NONE, ""),
        wins=f"{versus.wins}/{versus.n_pairs}",
        p=p_value(versus.p) if versus.difference.n >= MIN_SEEDS else NONE,
        is_strict=versus.p < threshold and found in CLEAR and is_controlled,
        verdict=found,
        bar=_bar(versus.difference, scale),
    )
    values = pair(row.val_loss), pair(row.primary)
    lr = f"{row.lr:g}"
    n_runs = row.primary.n + row.n_diverged
    median = number(row.median)
    return Entry(row.variant, row.base, lr, *values, median, shown, row.n_diverged, n_runs, is_best)


def _over_episodes(entry: Entry, records: list[Record]) -> Entry:
    """Return the entry of a single run with the interval over episodes of its grade."""
    record = next(r for r in records if r["variant"] == entry.variant)
    graded = estimate_of(record["grade"]["metrics"][record["primary"]])
    return replace(entry, primary=pair(graded))


def _lost(variant: str, runs: list[Record]) -> Entry:
    first, none, n = runs[0], (NONE, ""), len(runs)
    return Entry(variant, first["base"], f"{first['lr']:g}", none, none, NONE, None, n, n, False)


def _scale(rows: Sequence[LeaderboardRow]) -> float:
    """Return the difference at the edge of the drawings: the largest one except for outliers."""
    found = [r.versus_base.difference for r in rows if r.versus_base]
    extents = [max(abs(d.lo), abs(d.hi)) for d in found if math.isfinite(d.lo)]
    if not extents or max(extents) == 0:
        return math.nan
    return 1.05 * min(max(extents), CLIP * float(np.median(extents)) or math.inf)


def _bar(difference: Estimate, scale: float) -> tuple[float, float, float] | None:
    if not (math.isfinite(scale) and math.isfinite(difference.lo)):
        return None
    ends = (difference.lo, difference.mean, difference.hi)
    lo, mean, hi = (BAR / 2 * (1 + min(1.0, max(-1.0, x / scale))) for x in ends)
    return lo, mean, hi


def estimate_of(value: dict[str, Any]) -> Estimate:
    """Return a metric of a grade as an Estimate; null becomes NaN."""
    mean, lo, hi = (math.nan if value[key] is None else value[key] for key in ("mean", "lo", "hi"))
    return Estimate(mean, lo, hi, value["n"])
