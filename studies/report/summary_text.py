"""What is said below a leaderboard, on the page and in the terminal, in whole sentences."""

import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy import stats

from studies.report.format import factor
from studies.stats.analysis import (
    Record,
    by_variant,
    is_finished,
    is_reported,
    leaderboard,
    log_error,
    sweeps,
    teacher_forced,
)
from studies.stats.matched import Fit, base_points, placebo

MIN_RANKED = 3  # optimizers, of which an order says something


def rank_agreement(records: Sequence[Record]) -> tuple[float, int] | None:
    """Kendall's tau between the orders by mean teacher-forced and by mean rollout error, both as
    logarithms, and the number of optimizers; None for fewer than MIN_RANKED.

    Optimizers with a diverged run are left out, and those that lack a seed of the others: their
    means are over other seeds, of which each draws another instance of the task.
    """
    runs = by_variant(filter(is_reported, records)).values()
    finished = [own for own in runs if all(map(is_finished, own))]
    most = max(map(len, finished), default=0)
    means = [_means(own) for own in finished if len(own) == most]
    known = [pair for pair in means if all(map(math.isfinite, pair))]
    if len(known) < MIN_RANKED:
        return None
    tau, _ = np.array(stats.kendalltau(*zip(*known, strict=True)))
    return float(tau), len(known)


def _means(runs: list[Record]) -> tuple[float, float]:
    """Mean logarithms of teacher-forced and of rollout error; NaN where one is not positive."""
    before = [math.log(x) if (x := teacher_forced(record)) > 0 else math.nan for record in runs]
    return statistics.fmean(before), statistics.fmean(map(log_error, runs))


def on_ranks(records: Sequence[Record]) -> str:
    """Whether validation orders optimizers as rollouts do; empty where there are too few."""
    found = rank_agreement(records)
    if found is None or math.isnan(found[0]):
        return ""
    tau, n = found
    return (
        f"Errors on the data's contexts and of rollouts, two orders of {n} optimizers: Kendall's "
        f"tau = {tau:.2f} (1: the same order, 0: unrelated, -1: reversed)."
    )


def below_leaderboard(records: Sequence[Record]) -> list[str]:
    """What is said of its rows and their order; nothing where nothing is to be said."""
    return list(filter(None, (on_sweeps(records), on_seeds(records), on_ranks(records))))


def on_seeds(records: Sequence[Record]) -> str:
    """Which optimizers of a study lack seeds of others; empty where none does."""
    rows = leaderboard([record for record in records if record["role"] == "fresh"])
    if short := [row.variant for row in rows if row.n_missing]:
        return (
            "Not on all seeds, each of which draws another instance of the task, and so below what "
            f"is: {', '.join(short)}."
        )
    return ""


def on_sweeps(records: Sequence[Record]) -> str:
    """Optimizers that were swept and have no fresh runs, and why; empty where there are none."""
    fresh = {record["variant"] for record in records if is_reported(record)}
    found = {name: rates for name, rates in sweeps(list(records)).items() if name not in fresh}
    return "\n".join(
        f"{name} has no fresh runs: {_outcome([loss for _, loss, _ in rates])} the learning "
        f"rates {rates[0][0]:g} to {rates[-1][0]:g}."
        for name, rates in found.items()
    )


def _outcome(losses: list[float]) -> str:
    if not any(map(math.isfinite, losses)):
        return "a tuning run diverged at each of"
    return "no best one is known yet among"


def on_matched(records: Sequence[Record]) -> str:
    """What a factor at equal validation has to exceed, or why there is none."""
    fit = Fit(base_points(filter(is_reported, records)))
    if len(fit.names) < 2:
        return (
            "Nothing can be said at equal validation: that takes finished runs of at least two "
            f"base optimizers, here are {' and '.join(fit.names) or 'none'}."
        )
    if not fit.is_possible:
        return (
            "Nothing can be said at equal validation: no seed has two base optimizers that differ "
            "in it."
        )
    if found := placebo(records):
        most = max(abs(each.mean) for each in found.values())
        return (
            f"Two base optimizers differ by up to × {factor(most)} in the same way; nothing within "
            "that is evidence."
        )
    return (
        f"{len(fit.names)} base optimizers are too few to see how far two of them differ in the "
        "same way (the fit goes through them all), so a factor here is a hint and no evidence."
    )
