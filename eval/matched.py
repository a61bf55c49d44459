"""Are rollouts better than validation leads one to expect? Pairs at equal teacher-forced error."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from eval.analysis import Record, by_variant, is_reported, log_error, teacher_forced
from eval.intervals import Estimate, over_seeds

Point = tuple[float, float]  # log teacher-forced error, log rollout error


@dataclass(frozen=True)
class Matched:
    """Log rollout error against the base's at equal teacher-forced error; negative: better."""

    residual: Estimate  # mean over fresh seeds
    n_inside: int  # seeds in the range of the base runs
    n: int  # seeds


def matched_validation(records: list[Record]) -> dict[str, Matched]:
    """Is an optimizer better than its base at *equal* validation? Paired over fresh seeds.

        d_s = (y - y_base) - β (x - x_base),   x, y: log teacher-forced and log rollout error

    β is the slope of y in x over the fresh runs of all base optimizers, within seeds: a seed draws
    the task's instance, which shifts both. Its own uncertainty is left out. A pair counts if x lies
    in the range of the base runs of its seed: nothing is extrapolated.
    """
    fresh = list(filter(is_reported, records))
    bases = _base_points(fresh)
    slope = _slope(bases)
    if slope is None:
        return {}
    found = {}
    for variant, own in by_variant(r for r in fresh if r["variant"] != r["base"]).items():
        residuals = [d for r in own if (d := _residual(r, bases[r["seed"]], slope)) is not None]
        found[variant] = Matched(over_seeds(residuals), len(residuals), len(own))
    return found


def fit_curve(records: list[Record]) -> tuple[np.ndarray, np.ndarray]:
    """The line of slope β through the middle of the base runs: its ends x and y, (2,) each."""
    bases = _base_points(filter(is_reported, records))
    slope = _slope(bases)
    if slope is None:
        return np.empty(0), np.empty(0)
    x, y = np.array([point for seed in bases.values() for point in seed.values()]).T
    ends = np.array([x.min(), x.max()])
    return np.exp(ends), np.exp(y.mean() + slope * (ends - x.mean()))


def _base_points(records: Iterable[Record]) -> dict[int, dict[str, Point]]:
    """seed -> base optimizer -> (x, y)."""
    found: dict[int, dict[str, Point]] = defaultdict(dict)
    for record in records:
        if record["variant"] == record["base"] and (point := _point(record)):
            found[record["seed"]][record["base"]] = point
    return found


def _slope(bases: dict[int, dict[str, Point]]) -> float | None:
    """Least-squares slope of y in x with an intercept for each seed; None where x does not vary."""
    seeds = [[*points.values()] for points in bases.values()]
    centred = [np.subtract(points, np.mean(points, axis=0)) for points in seeds]
    x, y = np.concatenate(centred).T if centred else np.empty((2, 0))
    return float(x @ y / (x @ x)) if x @ x > 0 else None


def _residual(record: Record, bases: dict[str, Point], slope: float) -> float | None:
    """d of one run; None without its pair, or outside the range of the base runs."""
    point, base = _point(record), bases.get(record["base"])
    if point is None or base is None:
        return None
    xs = [x for x, _ in bases.values()]
    if not min(xs) <= point[0] <= max(xs):
        return None
    return (point[1] - base[1]) - slope * (point[0] - base[0])


def _point(record: Record) -> Point | None:
    """Logarithms of teacher-forced and of rollout error; None where there are none."""
    before, error = teacher_forced(record), log_error(record)
    if not (0 < before < math.inf and math.isfinite(error)):
        return None
    return math.log(before), error
