"""Bootstrap confidence intervals over the episodes of one run.

Intervals over seeds and paired tests are in studies/stats/seeds.py.
"""

import warnings
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95  # confidence level of every interval
RESAMPLES = 1000
# Fewer seeds give no interval: for two, t(0.975, 1) = 12.7, and a tie would have width 0.
MIN_SEEDS = 3


@dataclass(frozen=True)
class Estimate:
    """A mean over n units (episodes or seeds) with its confidence interval."""

    mean: float
    lo: float
    hi: float
    n: int


def bootstrap_weights(n: int, seed: int = 0) -> np.ndarray:  # (1 + RESAMPLES, n)
    """Count how often each of n units occurs in each resample.

    Row 0 is all ones, the sample itself.
    """
    resamples = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return np.concatenate([np.ones((1, n)), resamples])


def percentiles(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a statistic with the lower and upper ends of its percentile interval.

    Args:
        values: (1 + RESAMPLES, ...) the statistic computed with each row of `bootstrap_weights`.
            NaN resamples are left out; if all are NaN, the ends are NaN.
    """
    tail = 50 * (1 - LEVEL)
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        lo, hi = np.nanpercentile(values[1:], [tail, 100 - tail], axis=0)
    return values[0], lo, hi
