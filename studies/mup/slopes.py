"""Fit slopes of log2 of a quantity against log2 of the width, for each seed."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np

from eval.rollout.intervals import Estimate
from studies.stats.records import Record
from studies.stats.seeds import over_seeds


def widths_of(records: Iterable[Record]) -> list[int]:
    return sorted({record["width"] for record in records})


def slope(records: Iterable[Record], value: Callable[[Record], float | None]) -> Estimate:
    """Fit log2 value to log2 width by least squares for each seed; return mean and t-interval.

    Seeds with fewer than two widths are left out. The result is NaN if a value is missing or not
    positive.
    """
    seeds: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for record in records:
        size = value(record)
        log = math.log2(size) if size is not None and size > 0 else math.nan
        seeds[record["seed"]].append((math.log2(record["width"]), log))
    fits = [_fit(points) for points in seeds.values() if len({x for x, _ in points}) > 1]
    return over_seeds(fits)


def _fit(points: list[tuple[float, float]]) -> float:
    x, y = np.array(points).T
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())
