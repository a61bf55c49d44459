"""Are rollouts better than validation leads one to expect? Pairs at equal teacher-forced error."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import Polynomial

from eval.analysis import Record, by_variant, is_reported, log_error, teacher_forced
from eval.intervals import Estimate, over_seeds

MAX_DEGREE = 2
Point = tuple[float, float]  # log teacher-forced error, log rollout error


@dataclass(frozen=True)
class Matched:
    """Log rollout error against the base's at equal teacher-forced error; negative: better."""

    residual: Estimate  # mean over fresh seeds
    n_inside: int  # seeds in the range of the base runs
    n: int  # seeds


def matched_validation(records: list[Record]) -> dict[str, Matched]:
    """Is an optimizer better than its base at *equal* validation? Paired over fresh seeds.

        d_s = (y - y_base) - (f(x) - f(x_base)),   x, y: log teacher-forced and log rollout error

    f is fitted to the fresh runs of all base optimizers: a parabola (a line where there are only
    two bases), with an intercept for each seed, since a seed draws the task's instance, which
    shifts both. Its own uncertainty is left out. A pair counts if x lies in the range of the base
    runs of its seed: nothing is extrapolated.
    """
    fresh = list(filter(is_reported, records))
    bases = _base_points(fresh)
    f = _shape(bases)
    if f is None:
        return {}
    found = {}
    for variant, own in by_variant(r for r in fresh if r["variant"] != r["base"]).items():
        residuals = [d for r in own if (d := _residual(r, bases[r["seed"]], f)) is not None]
        found[variant] = Matched(over_seeds(residuals), len(residuals), len(own))
    return found


def fit_curve(records: list[Record]) -> tuple[np.ndarray, np.ndarray]:
    """f through the middle of the base runs, over their range: teacher-forced and rollout error."""
    bases = _base_points(filter(is_reported, records))
    f = _shape(bases)
    if f is None:
        return np.empty(0), np.empty(0)
    x, y = np.array([point for seed in bases.values() for point in seed.values()]).T
    grid = np.linspace(x.min(), x.max())
    return np.exp(grid), np.exp((y - f(x)).mean() + f(grid))


def _base_points(records: Iterable[Record]) -> dict[int, dict[str, Point]]:
    """seed -> base optimizer -> (x, y)."""
    found: dict[int, dict[str, Point]] = defaultdict(dict)
    for record in records:
        if record["variant"] == record["base"] and (point := _point(record)):
            found[record["seed"]][record["base"]] = point
    return found


def _shape(bases: dict[int, dict[str, Point]]) -> Polynomial | None:
    """f without its constant, by least squares within seeds; None where x does not vary."""
    degree = min(MAX_DEGREE, len({name for points in bases.values() for name in points}) - 1)
    seeds = [np.array([*points.values()]) for points in bases.values()]  # (bases, 2) each
    powers = [points[:, :1] ** np.arange(1, degree + 1) for points in seeds]  # (bases, degree)
    A = np.concatenate([each - each.mean(0) for each in powers]) if degree > 0 else np.zeros(0)
    if not A.any():
        return None
    y = np.concatenate([points[:, 1] - points[:, 1].mean() for points in seeds])
    return Polynomial([0, *np.linalg.lstsq(A, y)[0]])


def _residual(record: Record, bases: dict[str, Point], f: Polynomial) -> float | None:
    """d of one run; None without its pair, or outside the range of the base runs."""
    point, base = _point(record), bases.get(record["base"])
    if point is None or base is None:
        return None
    xs = [x for x, _ in bases.values()]
    if not min(xs) <= point[0] <= max(xs):
        return None
    return float((point[1] - base[1]) - (f(point[0]) - f(base[0])))


def _point(record: Record) -> Point | None:
    """Logarithms of teacher-forced and of rollout error; None where there are none."""
    before, error = teacher_forced(record), log_error(record)
    if not (0 < before < math.inf and math.isfinite(error)):
        return None
    return math.log(before), error
