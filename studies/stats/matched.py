"""Are rollouts better than validation leads one to expect? Pairs at equal teacher-forced error."""

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
from studies.stats.analysis import (
    Record,
    by_variant,
    half_an_episode,
    is_reported,
    log_error,
    teacher_forced,
)

MAX_DEGREE = 2
SINGULAR = 1e-12  # of eigenvalues, relative: a resample in which x hardly varies
SHARES = ("failure", "success", "survival")  # metrics between 0 and 1
Trial = tuple[float, float]  # log teacher-forced error, log (odds of) rollout error


@dataclass(frozen=True)
class Matched:
    """Log rollout error against the base's at equal teacher-forced error; negative: better.

    Of a share the odds, error / (1 - error): a logarithm of a share has a bound, no curve has.
    """

    residual: Estimate  # mean over fresh seeds
    n_inside: int  # seeds in the range of the base runs
    n: int  # seeds


def matched_validation(records: Iterable[Record]) -> dict[str, Matched]:
    """Is an optimizer better than its base at *equal* validation? Paired over fresh seeds.

        d_s = (y - y_base) - (f(x) - f(x_base)),   x, y: log teacher-forced and rollout error

    f is fitted to the fresh runs of all base optimizers: a parabola (a line where there are only
    two bases), with an intercept for each seed, since a seed draws the task's instance, which
    shifts both. A pair counts if x lies in the range of the base runs of its seed: nothing is
    extrapolated. Intervals are those of `Fit.mean`. `placebo` says what they have to exceed.
    """
    fresh = list(filter(is_reported, records))
    fit = Fit(base_points(fresh))
    if not fit.is_possible:
        return {}
    found = {}
    for variant, own in by_variant(r for r in fresh if r["variant"] != r["base"]).items():
        pairs = {r["seed"]: pair for r in own if (pair := _pair(r, fit.bases[r["seed"]]))}
        found[variant] = Matched(fit.mean(pairs), len(pairs), len(own))
    return found


def placebo(records: Iterable[Record]) -> dict[str, Estimate]:
    """d of each pair of base optimizers ("muon / adamw"): what no preconditioning explains.

    Their runs are those that f was fitted to, so these are too small rather than too large. Empty
    where f has a coefficient for each difference of two bases: it goes through their means then.
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
    """f through the middle of the base runs, over their range: teacher-forced and rollout error."""
    records = list(records)
    fit = Fit(base_points(filter(is_reported, records)))
    if not fit.is_possible:
        return np.empty(0), np.empty(0)
    f = Polynomial([0, *fit.ns_coefficients[0]])
    x, y = np.array([point for seed in fit.bases.values() for point in seed.values()]).T
    grid = np.linspace(x.min(), x.max())
    error = np.exp((y - f(x)).mean() + f(grid))
    return np.exp(grid), error / (1 + error) if is_share(records[0]) else error


def is_share(record: Record) -> bool:
    """Whether rollouts are ranked by a share of the episodes."""
    return record["primary"] in SHARES


def quantity(record: Record) -> str:
    """What is compared at equal validation, in words."""
    return "odds of an error" if is_share(record) else "error"


class Fit:
    """f without its constant, by least squares within seeds, for the seeds and each resample."""

    def __init__(self, bases: dict[int, dict[str, Trial]]) -> None:
        self.bases = bases  # seed -> base optimizer -> (x, y)
        self.names = sorted({name for points in bases.values() for name in points})
        self.degree = min(MAX_DEGREE, len(self.names) - 1)

    @property
    def is_possible(self) -> bool:
        """Whether there are two bases, and x varies between them."""
        return self.degree > 0 and bool(self._normal_equations[0].any())

    @cached_property
    def _weights(self) -> np.ndarray:  # (1 + RESAMPLES, seeds)
        return bootstrap_weights(len(self.bases))

    @cached_property
    def _normal_equations(self) -> tuple[np.ndarray, np.ndarray]:
        """AᵀA (seeds, degree, degree) and Aᵀy (seeds, degree), both centred within seeds."""
        grams, moments = [], []
        for points in self.bases.values():
            x, y = np.array([*points.values()]).T  # (bases,)
            A = self._powers(x) - self._powers(x).mean(0)  # (bases, degree)
            grams.append(A.T @ A)
            moments.append(A.T @ y)
        return np.array(grams), np.array(moments)

    @cached_property
    def ns_coefficients(self) -> np.ndarray:  # (1 + RESAMPLES, degree)
        """Row 0 is the fit to all seeds."""
        grams, moments = self._normal_equations
        inverse = np.linalg.pinv(np.tensordot(self._weights, grams, 1), SINGULAR, hermitian=True)
        return np.einsum("rij,rj->ri", inverse, self._weights @ moments)

    def mean(self, pairs: dict[int, tuple[Trial, Trial]]) -> Estimate:
        """The mean of d over seeds, and its interval with the error of f in it.

        Seeds are resampled RESAMPLES times (fixed seed) with all their runs, and f is fitted again
        in each resample; t(n - 1) times the standard deviation of the resampled means, which is
        corrected by n / (n - 1), is half of the interval. With f known it would be Student's.
        """
        places = [list(self.bases).index(seed) for seed in pairs]
        n = len(places)
        if not n:
            return Estimate(math.nan, math.nan, math.nan, 0)
        ours, theirs = np.array([*pairs.values()], dtype=float).transpose(1, 2, 0)  # (2, n) each
        explained = self.ns_coefficients @ (self._powers(ours[0]) - self._powers(theirs[0])).T
        weights = self._weights[:, places]  # (1 + RESAMPLES, n)
        sums = (weights * (ours[1] - theirs[1] - explained)).sum(1)
        drawn = weights.any(1)  # a resample may have none of these seeds
        means = sums[drawn] / weights[drawn].sum(1)
        if n < MIN_SEEDS:
            return Estimate(float(means[0]), math.nan, math.nan, n)
        half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * means[1:].std() * math.sqrt(n / (n - 1))
        return Estimate(float(means[0]), float(means[0] - half), float(means[0] + half), n)

    def _powers(self, x: np.ndarray) -> np.ndarray:  # (n,) -> (n, degree)
        return x[:, None] ** np.arange(1, self.degree + 1)


def base_points(records: Iterable[Record]) -> dict[int, dict[str, Trial]]:
    """seed -> base optimizer -> (x, y), of base runs that have both."""
    found: dict[int, dict[str, Trial]] = defaultdict(dict)
    for record in records:
        if record["variant"] == record["base"] and (point := _point(record)):
            found[record["seed"]][record["base"]] = point
    return found


def _pair(record: Record, bases: dict[str, Trial]) -> tuple[Trial, Trial] | None:
    """A run and its base's; None without either, or outside the range of the base runs."""
    point, base = _point(record), bases.get(record["base"])
    if point is None or base is None:
        return None
    xs = [x for x, _ in bases.values()]
    return (point, base) if min(xs) <= point[0] <= max(xs) else None


def _point(record: Record) -> Trial | None:
    """(x, y) of a run; None where there are none."""
    before, error = teacher_forced(record), log_error(record)
    if not (0 < before < math.inf and math.isfinite(error)):
        return None
    return math.log(before), _log_odds(record, error) if is_share(record) else error


def _log_odds(record: Record, log_share: float) -> float:
    """No success counts as half an episode, as no error does."""
    return log_share - math.log(max(-math.expm1(log_share), half_an_episode(record)))
