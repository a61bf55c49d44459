"""Write the sentences below a leaderboard, on the page and in the terminal."""

import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy import stats

from studies.report.format import factor
from studies.stats.analysis import leaderboard, sweeps
from studies.stats.errors import log_error
from studies.stats.matched import Fit, base_points, placebo
from studies.stats.records import Record, by_variant, is_finished, is_reported, teacher_forced

MIN_RANKED = 3  # the fewest optimizers whose order is compared


def rank_agreement(records: Sequence[Record]) -> tuple[float, int] | None:
    """Compare the order of optimizers by teacher-forced error with that by rollout error.

    Optimizers with a diverged run or with a missing seed are left out: their means would be over
    other seeds, and each seed draws another instance of the task.

    Returns:
        Kendall's tau between the orders by mean logarithms of the errors, and the number of
        optimizers; None for fewer than MIN_RANKED optimizers.
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
    """Return the mean logarithms of teacher-forced and rollout errors; NaN if one is not > 0."""
    on_data = [math.log(x) if (x := teacher_forced(record)) > 0 else math.nan for record in runs]
    return statistics.fmean(on_data), statistics.fmean(map(log_error, runs))


def on_ranks(records: Sequence[Record]) -> str:
    """Say whether validation orders the optimizers as rollouts do; empty for too few of them."""
    found = rank_agreement(records)
    if found is None or math.isnan(found[0]):
        return ""
    tau, n = found
    return (
        f"Kendall's tau between the orders of {n} optimizers by the error on the data's contexts "
        f"and by the rollout error is {tau:.2f} (1: the same order, 0: unrelated, -1: reversed)."
    )


def below_leaderboard(records: Sequence[Record]) -> list[str]:
    """Return the remarks on sweeps, seeds and ranks, without empty ones."""
    return list(filter(None, (on_sweeps(records), on_seeds(records), on_ranks(records))))


def on_seeds(records: Sequence[Record]) -> str:
    """Name the optimizers that lack seeds which others ran; empty if there are none."""
    rows = leaderboard([record for record in records if record["role"] == "fresh"])
    if short := [row.variant for row in rows if row.n_missing]:
        return (
            "These optimizers did not run on all seeds and are therefore ranked below the others: "
            f"{', '.join(short)}. Each seed draws another instance of the task."
        )
    return ""


def on_sweeps(records: Sequence[Record]) -> str:
    """Say why optimizers that were swept have no fresh runs; empty if all have fresh runs."""
    fresh = {record["variant"] for record in records if is_reported(record)}
    found = {name: rates for name, rates in sweeps(list(records)).items() if name not in fresh}
    return "\n".join(
        f"{name} has no fresh runs: {_reason([loss for _, loss, _ in rates])} the learning "
        f"rates {rates[0][0]:g} to {rates[-1][0]:g}."
        for name, rates in found.items()
    )


def _reason(losses: list[float]) -> str:
    if not any(map(math.isfinite, losses)):
        return "a tuning run diverged at each of"
    return "no best one is known yet among"


def on_matched(records: Sequence[Record]) -> str:
    """Say how large a factor at equal validation must be to matter, or why there is none."""
    fit = Fit(base_points(filter(is_reported, records)))
    if len(fit.names) < 2:
        return (
            "No comparison at equal validation: it requires finished runs of at least two base "
            f"optimizers, but there are {' and '.join(fit.names) or 'none'}."
        )
    if not fit.is_possible:
        return (
            "No comparison at equal validation: on no seed do two base optimizers differ in their "
            "validation."
        )
    if found := placebo(records):
        most = max(abs(each.mean) for each in found.values())
        return (
            f"Two base optimizers differ by up to × {factor(most)} in this comparison; a factor "
            "within that range is not evidence."
        )
    return (
        f"{len(fit.names)} base optimizers are too few to measure how far two of them differ in "
        "this comparison (the fit goes through all of them): a factor here is not evidence."
    )
