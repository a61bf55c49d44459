"""Measure how the best learning rate depends on the width: optima, shifts, regrets."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, stdev
from typing import Literal

import numpy as np

from studies.stats.records import Record

REACH = 2.0  # the parabola is fitted to rates within this many octaves of the best one
Losses = dict[float, float]  # mean validation loss by learning rate; infinite if a run diverged


@dataclass(frozen=True)
class Optimum:
    """The best learning rate at a width."""

    log2_lr: float
    loss: float
    kind: Literal["fit", "grid", "edge"]  # grid: no parabola fits; edge: the grid ends there


def losses_by_width(records: Iterable[Record]) -> dict[int, Losses]:
    """Return the mean validation loss over seeds by width and rate, the narrowest width first.

    Rates at which some seeds did not run are left out: their means would be over other seeds.
    """
    found: dict[int, dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        loss = math.inf if record["val_loss"] is None else record["val_loss"]
        found[record["width"]][record["lr"]][record["seed"]] = loss
    seeds = {seed for rates in found.values() for losses in rates.values() for seed in losses}
    return {
        width: {
            lr: mean(losses.values())
            for lr, losses in sorted(rates.items())
            if losses.keys() == seeds
        }
        for width, rates in sorted(found.items())
    }


def optimum(losses: Losses) -> Optimum:
    """Return the minimum of a parabola in log2 lr, fitted within REACH of the best rate.

    If the parabola has no minimum within an octave of the best rate, return that rate ("grid"). If
    the best rate is the lowest or highest one tried, the optimum is unknown ("edge").
    """
    best = min(losses, key=losses.__getitem__)
    at_best = Optimum(math.log2(best), losses[best], "grid")
    if best in (min(losses), max(losses)) or math.isinf(losses[best]):
        return Optimum(math.log2(best), losses[best], "edge")
    offsets = {math.log2(lr / best): loss for lr, loss in losses.items() if math.isfinite(loss)}
    near = {x: loss for x, loss in offsets.items() if abs(x) <= REACH}
    if len(near) < 3:
        return at_best
    a, b, c = np.polyfit([*near], [*near.values()], 2)
    if not a > 0 or abs(x := -b / (2 * a)) > 1:
        return at_best
    return Optimum(math.log2(best) + float(x), float(c - b * b / (4 * a)), "fit")


def shift(optima: dict[int, Optimum]) -> float:
    """Return the octaves from the best rate of the narrowest width to that of the widest.

    NaN if one of them is at the edge of its grid.
    """
    first, last = optima[min(optima)], optima[max(optima)]
    return math.nan if "edge" in (first.kind, last.kind) else last.log2_lr - first.log2_lr


def tuned(losses: Losses) -> float:
    """Return the rate with the lowest loss among those that ran, as a user's sweep would."""
    return min(losses, key=losses.__getitem__)


def regret(losses: Losses, lr: float) -> float:
    """Return (loss(lr) - min loss) / min loss over the rates of one width.

    It is zero for the best rate, infinite if `lr` diverges, and NaN if it did not run.
    """
    lowest = min(losses.values())
    return (losses.get(lr, math.nan) - lowest) / lowest


def steps_where_wider_is_worse(
    records: Iterable[Record], lr: float, from_step: int
) -> tuple[int, int]:
    """Count the steps at which the next width has a higher training loss at the same rate.

    A step counts if the mean difference over seeds, which see the same batches at all widths,
    exceeds two standard errors.

    Returns:
        The number of such steps and of all logged steps from `from_step` on. (0, 0) for fewer than
        two seeds, which have no standard error.
    """
    curves: dict[int, dict[int, dict[int, float]]] = defaultdict(dict)  # width, seed, step
    for record in records:
        if record["lr"] == lr and record["val_loss"] is not None:
            curve = {step: loss for step, loss in record["curve"] if loss is not None}
            curves[record["width"]][record["seed"]] = curve
    gaps = [
        gap
        for narrow, wide in pairwise(sorted(curves))
        for step, gap in _gaps(curves[narrow], curves[wide]).items()
        if step >= from_step and len(gap) > 1
    ]
    worse = [mean(gap) > 2 * stdev(gap) / math.sqrt(len(gap)) for gap in gaps]
    return sum(worse), len(worse)


def _gaps(
    narrow: dict[int, dict[int, float]], wide: dict[int, dict[int, float]]
) -> dict[int, list[float]]:
    """Return {step: loss of the wide model minus that of the narrow one, for each common seed}."""
    found: dict[int, list[float]] = defaultdict(list)
    for seed in narrow.keys() & wide.keys():
        for step in narrow[seed].keys() & wide[seed].keys():
            found[step].append(wide[seed][step] - narrow[seed][step])
    return found
