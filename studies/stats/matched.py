"""Compare rollout errors at equal teacher-forced error: does validation explain the rollouts?"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.polynomial import Polynomial
from scipy import stats

from eval.rollout.intervals import LEVEL, MIN_SEEDS, Estimate, bootstrap_weights
from studies.stats.errors import error_of, half_an_episode, log_error
from studies.stats.records import Record, by_variant, is_reported, teacher_forced

MAX_DEGREE = 2
SINGULAR = 1e-12  # relative eigenvalue below which a resample's x counts as constant
Point = tuple[float, float]  # log teacher-forced error, log (odds of) rollout error


@dataclass(frozen=True)
class Matched:
    """Log rollout error minus the base's at equal teacher-forced error; negative is better.

    If the error is a share of episodes, its odds, error / (1 - error), replace it: the logarithm of
    a share is bounded, and a fitted parabola is not.
    """

    residual: Estimate  # mean over fresh seeds
    n_inside: int  # seeds on which the variant lies in the range of the base runs
    n: int  # seeds


def matched_validation(records: Iterable[Record]) -> dict[str, Matched]:
    """Compare each variant with its base at *equal* validation, paired over fresh seeds.

        d_s = (y - y_base) - (f(x) - f(x_base)),   x, y: log teacher-forced and rollout error

    f is fitted to the fresh runs of all base optimizers. It is a parabola (a line if there are only
    two bases) with an intercept for each seed, because a seed draws the task's instance, which
    shifts x and y. A pair counts only if x lies in the range of the base runs of its seed, so that
    nothing is extrapolated. `Fit.mean` describes the intervals; `placebo` gives the size of d
    without any effect of preconditioning.
    """
    fresh = list(filter(is_reported, records))
    fit = Fit(base_points(fresh))
    if not fit.is_possible:
        return {}
    found = {}
    for variant, own in by_variant(r for r in fresh if r["variant"] != r["base"]).items():
        pairs = {r["seed"]: pair for r in own if (pair := _pair(r, fit.bases.get(r["seed"], {})))}
        found[variant] = Matched(fit.mean(pairs), len(pairs), len(own))
    return found


def placebo(records: Iterable[Record]) -> dict[str, Estimate]:
    """Return d of each pair of base optimizers ("muon / adamw"): none is due to preconditioning.

    f was fitted to these runs, so the values tend to be too small. The result is empty if f has as
    many coefficients as there are differences between bases: f then goes through their means.
    """
    fit = Fit(base_points(filter(is_reported, records)))
    if not fit.is_possible or len(fit.names) < fit.degree + 2:
        return {}
    found = {}
    for a, b in combinations(fit.names, 2):
        seeds = {seed: own for seed, own in fit.bases.items() if a in own and b in own}
        if seeds:
            found[f"{a} / {b}"] = fit.mean({s: (own[a], own[b]) for s, own in seeds.items()})
    return found


def fit_curve(records: Iterable[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Return points on f, drawn through the middle of the base runs and over their range.

    Returns teacher-forced errors and rollout errors; both are empty if f cannot be fitted.
    """
    records = list(records)
    fit = Fit(base_points(filter(is_reported, records)))
    if not fit.is_possible:
        return np.empty(0), np.empty(0)
    f = Polynomial([0, *fit.coefficients[0]])
    x, y = np.array([point for seed in fit.bases.values() for point in seed.values()]).T
    grid = np.linspace(x.min(), x.max())
    error = np.exp((y - f(x)).mean() + f(grid))
    return np.exp(grid), error / (1 + error) if error_of(records[0]).is_share else error


def quantity(record: Record) -> str:
    """Return the name of the quantity that is compared at equal validation."""
    return "odds of an error" if error_of(record).is_share else "error"


class Fit:
    """Fit f by least squares with an intercept per seed, for the seeds and for each resample."""

    def __init__(self, bases: dict[int, dict[str, Point]]) -> None:
        self.bases = bases  # seed -> base optimizer -> (x, y)
        self.names = sorted({name for points in bases.values() for name in points})
        self.degree = min(MAX_DEGREE, len(self.names) - 1)

    @property
    def is_possible(self) -> bool:
        """Whether there are at least two bases and x varies between them."""
        return self.degree > 0 and bool(self._normal_equations[0].any())

    @cached_property
    def _weights(self) -> np.ndarray:  # (1 + RESAMPLES, seeds)
        return bootstrap_weights(len(self.bases))

    @cached_property
    def _normal_equations(self) -> tuple[np.ndarray, np.ndarray]:
        """Return AᵀA (seeds, degree, degree) and Aᵀy (seeds, degree), centred within seeds."""
        grams, moments = [], []
        for points in self.bases.values():
            x, y = np.array([*points.values()]).T  # (bases,)
            A = self._powers(x) - self._powers(x).mean(0)  # (bases, degree)
            grams.append(A.T @ A)
            moments.append(A.T @ y)
        return np.array(grams), np.array(moments)

    @cached_property
    def coefficients(self) -> np.ndarray:  # (1 + RESAMPLES, degree)
        """Row 0 is the fit to all seeds."""
        grams, moments = self._normal_equations
        inverse = np.linalg.pinv(np.tensordot(self._weights, grams, 1), SINGULAR, hermitian=True)
        return np.einsum("rij,rj->ri", inverse, self._weights @ moments)

    def mean(self, pairs: dict[int, tuple[Point, Point]]) -> Estimate:
        """Return the mean of d over seeds and an interval that includes the error of f.

        Seeds are resampled RESAMPLES times (with a fixed random seed) together with all their runs,
        and f is fitted again to each resample. Half of the interval is t(n - 1) times the standard
        deviation of the resampled means, whose variance is corrected by n / (n - 1). If f were
        known exactly, this would be Student's interval.
        """
        columns = [list(self.bases).index(seed) for seed in pairs]
        n = len(columns)
        if not n:
            return Estimate(math.nan, math.nan, math.nan, 0)
        own, base = np.array([*pairs.values()], dtype=float).transpose(1, 2, 0)  # (2, n) each
        explained = self.coefficients @ (self._powers(own[0]) - self._powers(base[0])).T
        weights = self._weights[:, columns]  # (1 + RESAMPLES, n)
        sums = (weights * (own[1] - base[1] - explained)).sum(1)
        drawn = weights.any(1)  # a resample may contain none of these seeds
        means = sums[drawn] / weights[drawn].sum(1)
        if n < MIN_SEEDS:
            return Estimate(float(means[0]), math.nan, math.nan, n)
        half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * means[1:].std() * math.sqrt(n / (n - 1))
        return Estimate(float(means[0]), float(means[0] - half), float(means[0] + half), n)

    def _powers(self, x: np.ndarray) -> np.ndarray:  # (n,) -> (n, degree)
        return x[:, None] ** np.arange(1, self.degree + 1)


def base_points(records: Iterable[Record]) -> dict[int, dict[str, Point]]:
    """Return {seed: {base optimizer: (x, y)}} of the base runs that have both numbers."""
    found: dict[int, dict[str, Point]] = defaultdict(dict)
    for record in records:
        if record["variant"] == record["base"] and (point := _point(record)):
            found[record["seed"]][record["base"]] = point
    return dict(found)


def _pair(record: Record, bases: dict[str, Point]) -> tuple[Point, Point] | None:
    """Return the points of a run and of its base.

    Returns None if one of them is missing or the run lies outside the range of the base runs.
    """
    point, base = _point(record), bases.get(record["base"])
    if point is None or base is None:
        return None
    xs = [x for x, _ in bases.values()]
    return (point, base) if min(xs) <= point[0] <= max(xs) else None


def _point(record: Record) -> Point | None:
    """Return (x, y) of a run; None if a logarithm does not exist."""
    on_data, error = teacher_forced(record), log_error(record)
    if not (0 < on_data < math.inf and math.isfinite(error)):
        return None
    return math.log(on_data), _log_odds(record, error) if error_of(record).is_share else error


def _log_odds(record: Record, log_share: float) -> float:
    """Return the log-odds of an error; no success counts as half an episode, as no error does."""
    return log_share - math.log(max(-math.expm1(log_share), half_an_episode(record)))
