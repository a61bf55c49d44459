"""Compare runs of several lengths with those of a base at equal loss."""

from collections.abc import Iterable, Sequence

import numpy as np

from eval.rollout.intervals import Estimate
from studies.stats.seeds import over_seeds


def difference_at_equal(x: float, y: float, base: Iterable[tuple[float, float]]) -> float:
    """Return y minus the base's y at the same x.

    base: (x, y) of the base's runs, joined by lines. The result is NaN outside their range, and for
        fewer than two of them.
    """
    points = sorted(base)
    if len(points) < 2:
        return np.nan
    xs, ys = zip(*points, strict=True)
    return y - float(np.interp(x, xs, ys, left=np.nan, right=np.nan))


def over_lengths(differences: Iterable[Sequence[float]]) -> Estimate:
    """Return the mean over seeds of the mean over lengths, with the interval over seeds.

    differences: for each seed, those of runs of several lengths; NaN does not count.
    """
    known = [[each for each in own if not np.isnan(each)] for own in differences]
    return over_seeds([float(np.mean(own)) for own in known if own])
