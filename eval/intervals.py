"""Uncertainty: bootstrap over episodes inside one run, Student's t over seeds, paired tests."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95  # of every interval
RESAMPLES = 1000
MIN_SEEDS = 3  # of an interval over seeds: with two, t(0.975, 1) = 12.7, and a tie is 0 wide


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval, over n units (episodes or seeds)."""

    mean: float
    lo: float
    hi: float
    n: int


@dataclass(frozen=True)
class Paired:
    """a minus b over pairs: the mean difference, its t-interval, p (two-sided), wins of a."""

    difference: Estimate
    p: float  # 1 for fewer than MIN_SEEDS pairs or equal differences
    wins: int  # pairs in which a is lower
    n_pairs: int


def bootstrap_weights(n: int, seed: int = 0) -> np.ndarray:  # (1 + RESAMPLES, n)
    """How often each of n units is in each resample. Row 0 is the sample itself, all ones."""
    resamples = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return np.concatenate([np.ones((1, n)), resamples])


def percentiles(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, lower and upper end of what was computed with each row of `bootstrap_weights`.

    values: (1 + RESAMPLES, ...). The ends are percentiles of the resamples; NaN if all are NaN, or
    infinite.
    """
    tail = 50 * (1 - LEVEL)
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        lo, hi = np.nanpercentile(values[1:], [tail, 100 - tail], axis=0)
    return values[0], lo, hi


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one number a seed, with Student's t-interval; NaN where seeds are too few."""
    if not len(values):
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    mean, n = float(np.mean(values)), len(values)
    if n < MIN_SEEDS:
        return Estimate(mean, float("nan"), float("nan"), n)
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n)
    return Estimate(mean, float(mean - half), float(mean + half), n)


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Compare two optimizers on the same seeds, lower is better. ValueError if the numbers of seeds
    differ.
    """
    if len(a) != len(b):
        raise ValueError(f"paired: {len(a)} values against {len(b)}; wants one pair a seed")
    difference = np.subtract(a, b)
    wins = int((difference < 0).sum())
    return Paired(over_seeds(difference.tolist()), _p_value(difference), wins, len(a))


def _p_value(difference: np.ndarray) -> float:
    """Two-sided, of Student's t-test against zero; 1 where there is no spread to judge by."""
    if len(difference) < MIN_SEEDS or np.ptp(difference) == 0:
        return 1.0
    t = difference.mean() / (difference.std(ddof=1) / np.sqrt(len(difference)))
    return float(2 * stats.t.sf(abs(t), len(difference) - 1))
