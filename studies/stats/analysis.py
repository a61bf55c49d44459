"""Compare optimizers over seeds: leaderboards, curves along a rollout, learning-rate sweeps.

Only fresh runs, on seeds that were not used for tuning, and single runs enter the leaderboard.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import itemgetter
from statistics import fmean

import numpy as np

from eval.rollout.intervals import Estimate
from studies.stats.errors import log_error, primary
from studies.stats.records import (
    Record,
    by_variant,
    grouped,
    is_control,
    is_finished,
    is_reported,
    val_loss,
)
from studies.stats.seeds import Paired, over_seeds, paired


@dataclass(frozen=True)
class Compared(Paired):
    """A variant against its base over the seeds that both ran.

    The difference, its interval and p use the pairs in which neither run diverged.
    """

    n_lost: int  # pairs in which the variant diverged
    n_base_lost: int  # pairs in which the base diverged


@dataclass(frozen=True)
class LeaderboardRow:
    """One optimizer on a leaderboard."""

    variant: str
    base: str
    lr: float
    val_loss: Estimate  # nats per scored token
    primary: Estimate
    median: float  # of the primary metric over seeds; one outlier does not move it
    mean_log_error: float  # orders the leaderboard
    versus_base: Compared | None  # log error, paired over seeds; None for a base
    at_this_rate: Compared | None  # the same against the base at the variant's own learning rate
    val_versus_base: Compared | None  # nats
    n_diverged: int
    n_missing: int  # seeds that other variants ran and this one did not


def references(records: list[Record]) -> dict[str, tuple[Estimate, Estimate]]:
    """Return the validation loss and the primary metric over seeds of each reference policy."""
    rows = by_variant(record for record in records if record["role"] == "reference")
    # Several folders may contain the same reference on the same seed.
    one_per_seed = {
        name: {record["seed"]: record for record in runs}.values() for name, runs in rows.items()
    }
    return {
        name: (over_seeds([*map(val_loss, runs)]), over_seeds([*map(primary, runs)]))
        for name, runs in one_per_seed.items()
    }


def leaderboard(records: list[Record]) -> list[LeaderboardRow]:
    """Return one row per variant, ordered by mean `log_error`, because errors compare as ratios.

    Variants with a diverged run come last. Before them come variants that lack seeds which other
    variants ran: a seed draws an instance of the task, and instances differ in difficulty.
    """
    runs = by_variant(filter(is_reported, records))
    n_seeds = len({record["seed"] for own in runs.values() for record in own})
    controls = grouped(filter(is_control, records), itemgetter("variant", "lr"))
    rows = []
    for own in runs.values():
        base_name, lr = own[0]["base"], own[0]["lr"]
        base = runs.get(base_name, [])
        at_this_rate = [record for record in base if record["lr"] == lr]
        at_this_rate = at_this_rate or controls.get((base_name, lr), [])
        rows.append(_row(own, base, at_this_rate, n_seeds))
    return sorted(rows, key=lambda row: (row.n_diverged, row.n_missing, row.mean_log_error))


def _row(
    own: list[Record], base: list[Record], at_this_rate: list[Record], n_seeds: int
) -> LeaderboardRow:
    first = own[0]
    finished = [record for record in own if is_finished(record)]
    is_base = first["variant"] == first["base"]
    values = [primary(record) for record in finished]
    return LeaderboardRow(
        variant=first["variant"],
        base=first["base"],
        lr=first["lr"],
        val_loss=over_seeds([val_loss(record) for record in finished]),
        primary=over_seeds(values),
        median=float(np.median(values)) if values else math.nan,
        mean_log_error=over_seeds([log_error(record) for record in finished]).mean,
        versus_base=None if is_base else versus(own, base, log_error),
        at_this_rate=None if is_base else versus(own, at_this_rate, log_error),
        val_versus_base=None if is_base else versus(own, base, val_loss),
        n_diverged=len(own) - len(finished),
        n_missing=n_seeds - len({record["seed"] for record in own}),
    )


def versus(
    own: list[Record], base: list[Record], value: Callable[[Record], float]
) -> Compared | None:
    """Compare `own` with `base`, paired over the seeds of both; lower values are better.

    Returns None if no seed has both.
    """
    own_values, base_values = (
        {r["seed"]: value(r) if math.isfinite(value(r)) else math.inf for r in records}
        for records in (own, base)
    )
    seeds = [seed for seed in own_values if seed in base_values]
    if not seeds:
        return None
    pairs = [(own_values[seed], base_values[seed]) for seed in seeds]
    finished = [pair for pair in pairs if all(map(math.isfinite, pair))]
    a, b = zip(*finished, strict=True) if finished else ((), ())
    n_lost, n_base_lost = (sum(map(math.isinf, runs)) for runs in zip(*pairs, strict=True))
    found = replace(paired(a, b), wins=sum(x < y for x, y in pairs), n_pairs=len(pairs))
    return Compared(**vars(found), n_lost=n_lost, n_base_lost=n_base_lost)


def seed_curves(
    records: list[Record], name: str
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return one curve of each variant: its mean and t-interval over seeds, shape (H,) each.

    A single run has no spread over seeds; it keeps its own interval over episodes. Variants with a
    run that lacks the curve are left out.
    """
    return {
        variant: _over_runs([record["grade"]["curves"][name] for record in runs])
        for variant, runs in by_variant(filter(is_reported, records)).items()
        if all(record["grade"] and name in record["grade"]["curves"] for record in runs)
    }


def _over_runs(curves: list[dict[str, list[float]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if len(curves) == 1:
        mean, lo, hi = (np.array(curves[0][key], dtype=float) for key in ("mean", "lo", "hi"))
        return mean, lo, hi
    steps = np.array([curve["mean"] for curve in curves], dtype=float).T  # (H, seeds)
    estimates = [over_seeds(values.tolist()) for values in steps]
    mean, lo, hi = np.array([(each.mean, each.lo, each.hi) for each in estimates]).T
    return mean, lo, hi


def sweeps(records: list[Record]) -> dict[str, list[tuple[float, float, float]]]:
    """Return (lr, val_loss, primary) of each variant's tuning runs, as means over seeds, by lr."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for variant, runs in by_variant(r for r in records if r["role"] == "tuning").items():
        at_rate = grouped(sorted(runs, key=itemgetter("lr")), itemgetter("lr"))
        found[variant] = [
            (lr, fmean(map(val_loss, same_lr)), fmean(map(primary, same_lr)))
            for lr, same_lr in at_rate.items()
        ]
    return found
