"""Compare fields over seeds: at the tuned rates, at equal rates and at equal excess loss.

Every comparison is a mean difference of the logarithms of a metric, paired by seed, with Student's
95 % interval; negative is better. A seed with a diverged run is left out, and the number of seeds
is part of the result.
"""

import math
from collections.abc import Sequence

import numpy as np

from eval.rollout.intervals import Estimate
from studies.stats.equal_loss import difference_at_equal, over_lengths
from studies.stats.seeds import over_seeds

Metrics = dict[str, float] | None  # None if the run diverged


def log_ratio(own: Sequence[Metrics], base: Sequence[Metrics], metric: str) -> Estimate:
    """Return the mean of log(own / base) over seeds."""
    pairs = zip(own, base, strict=True)
    return over_seeds([math.log(a[metric] / b[metric]) for a, b in pairs if a and b])


def matched(
    own: Sequence[Sequence[Metrics]], base: Sequence[Sequence[Metrics]], metric: str
) -> Estimate:
    """Return the mean of log(own / base) at equal excess loss over seeds.

    For each seed, the runs of the base with several numbers of steps give log metric as a function
    of log excess loss, linear between neighbouring runs. Runs of `own` outside the range of the
    base do not count; the others are averaged per seed.

    own, base: for each seed, the metrics of runs with several numbers of steps.
    """
    return over_lengths(
        [_above(run, reference, metric) for run in runs if run]
        for runs, reference in zip(own, base, strict=True)
    )


def _above(run: dict[str, float], base: Sequence[Metrics], metric: str) -> float:
    """Return log metric minus that of the base at equal excess loss; NaN outside its range."""
    points = [(math.log(b["excess"]), math.log(b[metric])) for b in base if b]
    return difference_at_equal(math.log(run["excess"]), math.log(run[metric]), points)


def as_ratio(estimate: Estimate) -> str:
    """Format a difference of logarithms as a ratio with its interval and number of seeds."""
    if not estimate.n:
        return "no seed"
    mean, lo, hi = np.exp([estimate.mean, estimate.lo, estimate.hi])
    return f"{mean:.3f} [{lo:.3f}, {hi:.3f}] ({estimate.n})"
