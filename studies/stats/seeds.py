"""Confidence intervals and paired tests over training seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from eval.rollout.intervals import LEVEL, MIN_SEEDS, Estimate


@dataclass(frozen=True)
class Paired:
    """a minus b over pairs: the mean difference, its t-interval, p (two-sided), wins of a."""

    difference: Estimate
    p: float  # 1 for fewer than MIN_SEEDS pairs or equal differences
    wins: int  # pairs in which a is lower
    n_pairs: int


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
