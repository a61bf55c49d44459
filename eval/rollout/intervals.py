"""Uncertainty: bootstrap over episodes inside one run, Student's t over seeds, paired tests."""

import warnings
from dataclasses import dataclass

import numpy as np

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
