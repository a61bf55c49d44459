"""Compute confidence intervals and paired tests over training seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from eval.rollout.intervals import LEVEL, MIN_SEEDS, Estimate


@dataclass(frozen=True)
class Paired:
    """The difference a - b over pairs."""

    difference: Estimate  # mean and t-interval
    p: float  # two-sided; 1 for fewer than MIN_SEEDS pairs or equal differences
    wins: int  # pairs in which a is lower
    n_pairs: int


def over_seeds(values: Sequence[float]) -> Estimate:
    """Return the mean over seeds with Student's t-interval.

    The interval is NaN for fewer than MIN_SEEDS values, the mean for none.
    """
    if not len(values):
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    mean, n = float(np.mean(values)), len(values)
    if n < MIN_SEEDS:
        return Estimate(mean, float("nan"), float("nan"), n)
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n)
    return Estimate(mean, float(mean - half), float(mean + half), n)


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Compare two optimizers on the same seeds; lower values are better.

    Raises ValueError if `a` and `b` have different lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"paired: {len(a)} and {len(b)} values; expected one pair per seed")
    difference = np.subtract(a, b)
    wins = int((difference < 0).sum())
    return Paired(over_seeds(difference.tolist()), _p_value(difference), wins, len(a))


def _p_value(difference: np.ndarray) -> float:
    """Return the two-sided p of Student's t-test against zero; 1 if the values have no spread."""
    if len(difference) < MIN_SEEDS or np.ptp(difference) == 0:
        return 1.0
    t = difference.mean() / (difference.std(ddof=1) / np.sqrt(len(difference)))
    return float(2 * stats.t.sf(abs(t), len(difference) - 1))
