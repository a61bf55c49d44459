"""What a report says of one task and training length: plain values, ready for the template.

A section holds either fresh and tuning runs of studies or single runs; they are never mixed, since
the first have intervals over seeds and the second over the episodes of one run.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from eval.analysis import Record, Row, groups, is_reported, leaderboard, primary
from eval.intervals import Estimate
from eval.typeset import NONE, Cell, p_value, pair, times, verdict

BAR = 100  # the width of an interval's drawing; the middle is no difference
FAMILY = 0.05  # chance of any false star on a page, at most
CLIP = 4  # times the median extent: what a drawing can show


@dataclass(frozen=True)
class Versus:
    """A variant against its base."""

    error: Cell  # ratio of the rollout errors
    val_loss: Cell  # difference, nats
    wins: str  # "4/5"
    p: str
    is_strict: bool  # p is below the section's threshold
    verdict: str  # better | worse | unclear | one seed
    bar: tuple[float, float, float] | None  # interval and mean, 0 to BAR


@dataclass(frozen=True)
class Entry:
    """One line of the leaderboard."""

    variant: str
    base: str
    lr: str
    val_loss: Cell
    primary: Cell
    versus: Versus | None
    diverged: int
    n_runs: int
    is_best: bool  # told apart from every other variant, seed by seed


@dataclass(frozen=True)
class Section:
    """The records of one task, training length and kind, and what is shown of them."""

    task: str
    steps: int
    knobs: str  # the task's specification without its instance
    is_study: bool
    records: list[Record]  # of optimizers
    references: list[Record]  # of nobody: the oracle, the uniform model
    metric: str
    higher_is_better: bool
    entries: list[Entry]
    threshold: float  # of p, for a star

    @property
    def n_comparisons(self) -> int:
        return sum(entry.variant != entry.base for entry in self.entries)

    @property
    def before(self) -> str:
        """The error on the data's contexts, as rollouts are compared with it."""
        graded = [record["grade"]["metrics"] for record in self.records if record["grade"]]
        has_oracle = any("val_kl" in metrics for metrics in graded)
        return "oracle KL on the data’s contexts" if has_oracle else "validation loss"

    @property
    def anchor(self) -> str:
        kind = "study" if self.is_study else "runs"
        digest = hashlib.sha256(self.knobs.encode()).hexdigest()[:6]
        return f"{self.task}-{self.steps}-{kind}-{digest}"


def make_sections(records: Sequence[Record]) -> list[Section]:
    """Studies first; tasks with other knobs are other tasks.

    A star is for p below FAMILY / number of comparisons in all studies (Bonferroni).
    """
    found = [
        (is_study, own)
        for is_study in (True, False)
        for own in _alike(r for r in records if (r["role"] != "single") == is_study)
    ]
    n_comparisons = sum(_n_comparisons(own) for is_study, own in found if is_study)
    threshold = FAMILY / max(1, n_comparisons)
    return [_section(own, is_study=is_study, threshold=threshold) for is_study, own in found]


def _alike(records: Iterable[Record]) -> list[list[Record]]:
    """Records of the same task, training length and knobs."""
    return [
        [record for record in group if knobs_of(record["spec"]) == knobs]
        for group in groups(records).values()
        for knobs in sorted({knobs_of(record["spec"]) for record in group})
    ]


def _n_comparisons(records: list[Record]) -> int:
    reported = filter(is_reported, records)
    return len({r["variant"] for r in reported if r["variant"] != r["base"]})


def _section(group: list[Record], *, is_study: bool, threshold: float) -> Section:
    own = [record for record in group if record["role"] != "reference"]
    own = own if is_study else name_apart(own)
    return Section(
        task=group[0]["task"],
        steps=group[0]["steps"],
        knobs=knobs_of(group[0]["spec"]),
        is_study=is_study,
        records=own,
        references=[record for record in group if record["role"] == "reference"],
        metric=group[0]["primary"],
        higher_is_better=group[0]["higher_is_better"],
        entries=entries(own, is_study=is_study, threshold=threshold),
        threshold=threshold,
    )


def knobs_of(spec: str) -> str:
    """The specification of a task without the instance, which a seed draws."""
    return re.sub(r"\binstance=\d+,?", "", spec).rstrip(",")


def name_apart(records: Sequence[Record]) -> list[Record]:
    """Single runs; those of one variant are told apart by their folders."""
    names = [record["variant"] for record in records]
    return [
        record | {"variant": f"{name} ({record['settings']['out_dir']})"}
        if names.count(name) > 1
        else record
        for name, record in zip(names, records, strict=True)
    ]


def entries(records: list[Record], *, is_study: bool, threshold: float) -> list[Entry]:
    """The leaderboard, best first; last, what never finished."""
    reported = [record for record in records if is_reported(record)]
    finished = {r["variant"] for r in reported if math.isfinite(primary(r))}
    rows = leaderboard([r for r in reported if r["variant"] in finished])
    best = clear_best(reported, rows)
    scale = _scale(rows)
    found = [_entry(row, scale, threshold, row.variant == best) for row in rows]
    if not is_study:
        found = [_over_episodes(entry, reported) for entry in found]
    lost = sorted({r["variant"] for r in reported} - finished)
    return found + [_lost(name, [r for r in reported if r["variant"] == name]) for name in lost]


def clear_best(records: list[Record], rows: list[Row]) -> str | None:
    """The first variant, if its paired interval against each other one excludes zero."""
    if len(rows) < 2 or rows[0].n_diverged:
        return None
    names = {row.variant for row in rows}
    against = [r | {"base": rows[0].variant} for r in records if r["variant"] in names]
    others = [row.versus_base for row in leaderboard(against) if row.variant != rows[0].variant]
    worse = [each and verdict(each) == "worse" for each in others]
    return rows[0].variant if all(worse) else None


def _entry(row: Row, scale: float, threshold: float, is_best: bool) -> Entry:
    versus, val = row.versus_base, row.val_versus_base
    shown = versus and Versus(
        error=times(versus.difference),
        val_loss=pair(val.difference, sign=True) if val else (NONE, ""),
        wins=f"{versus.wins}/{versus.n_pairs}",
        p=p_value(versus.p) if versus.difference.n > 1 else NONE,
        is_strict=versus.p < threshold,
        verdict=verdict(versus),
        bar=_bar(versus.difference, scale),
    )
    values = pair(row.val_loss), pair(row.primary)
    lr = f"{row.lr:g}"
    n_runs = row.primary.n + row.n_diverged
    return Entry(row.variant, row.base, lr, *values, shown, row.n_diverged, n_runs, is_best)


def _over_episodes(entry: Entry, records: list[Record]) -> Entry:
    """A single run's interval is the one of its grade."""
    record = next(r for r in records if r["variant"] == entry.variant)
    graded = estimate(record["grade"]["metrics"][record["primary"]])
    return replace(entry, primary=pair(graded))


def _lost(variant: str, runs: list[Record]) -> Entry:
    first, none, n = runs[0], (NONE, ""), len(runs)
    return Entry(variant, first["base"], f"{first['lr']:g}", none, none, None, n, n, False)


def _scale(rows: Sequence[Row]) -> float:
    """The difference at the edge of the drawings: the largest, but not the outliers'."""
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


def estimate(value: dict[str, Any]) -> Estimate:
    """A metric of a grade; null is NaN."""
    mean, lo, hi = (math.nan if value[key] is None else value[key] for key in ("mean", "lo", "hi"))
    return Estimate(mean, lo, hi, value["n"])


def finished_runs(section: Section) -> dict[str, list[Record]]:
    """Reported runs that did not diverge, by variant, in the order of the leaderboard."""
    found: dict[str, list[Record]] = {entry.variant: [] for entry in section.entries}
    for record in section.records:
        if is_reported(record) and math.isfinite(primary(record)):
            found[record["variant"]].append(record)
    return {variant: own for variant, own in found.items() if own}
