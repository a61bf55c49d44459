"""Tune the learning rate of each optimizer by the loss; measure the distance on other seeds."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from eval.rollout.intervals import Estimate
from eval.tables import markdown
from studies.feature_learning.task import make_task
from studies.feature_learning.training import Curve, train
from studies.stats.seeds import over_seeds
from studies.sweep.study import best_rate, search_rates


class Setup(NamedTuple):
    """The settings that a row shares with its base."""

    noise: float  # standard deviation of each output's noise
    condition: float  # κ, of the covariance of the inputs
    steps: int
    optimizer: str


RATES = {  # the first learning rates of a sweep, for all modes
    "sgd": (0.025, 0.05, 0.1),
    "adamw": (0.02, 0.04, 0.08),
    "muon": (0.08, 0.16, 0.32),
}
MODES: dict[str, dict[str, Any]] = {
    "base": {},
    "exact": {"gamma": 0.1},  # exact mode with the γ of train.py, in both layers
    "G alone": {"gamma": 1e-3, "include": ["0"]},  # as in the proposition: G, γ → 0
}
SETUPS = [
    Setup(*each, optimizer)
    for each in [
        *((noise, condition, 100) for noise in (0.0, 0.5) for condition in (1, 10, 100)),
        *((0.1, 100, steps) for steps in (100, 300)),
    ]
    for optimizer in RATES
]
TUNING_SEED, FRESH_SEEDS = 0, (10, 11, 12, 13, 14, 15)
Row = dict[str, Any]


def run(setup: Setup, lr: float, seed: int, mode: str) -> Curve:
    """Train on the task of a seed; the task, the weights and the batches have separate seeds."""
    task = make_task(setup.condition, setup.noise, 3 * seed)
    return train(task, setup.optimizer, lr, 3 * seed + 1, MODES[mode], setup.steps)


def measure() -> Iterator[Row]:
    """Yield one row for each setup and mode."""
    for setup in SETUPS:
        base: list[Curve] = []
        for mode in MODES:  # the base comes first
            row, curves = _tuned(setup, mode)
            base = base or curves
            pairs = [equal_loss_distances(*each) for each in zip(curves, base, strict=True)]
            yield row | {"at_equal_loss": [[_rounded(x) for x in pair] for pair in pairs]}


def _tuned(setup: Setup, mode: str) -> tuple[Row, list[Curve]]:
    """Return the sweep of the rate and the results of the fresh seeds at the best one."""

    def final_loss(lr: float) -> float:
        curve = run(setup, lr, TUNING_SEED, mode)
        return curve.losses[-1] if curve.has_finished else math.inf

    sweep = search_rates(final_loss, RATES[setup.optimizer], setup.optimizer)
    lr = best_rate(sweep)
    curves = [run(setup, lr, seed, mode) for seed in FRESH_SEEDS]
    finished = [curve for curve in curves if curve.has_finished]
    row: Row = {**setup._asdict(), "mode": mode, "lr": lr}
    row["sweep"] = {rate: _rounded(loss) for rate, loss in sweep.items()}
    for key in ("losses", "distances"):
        values = [getattr(curve, key) for curve in curves]
        row[key] = [
            _rounded(own[-1] if curve.has_finished else math.nan)
            for own, curve in zip(values, curves, strict=True)
        ]
        logs = np.log([getattr(curve, key) for curve in finished])
        row[f"{key}_over_steps"] = [_rounded(x) for x in np.exp(logs.mean(0))] if finished else []
    return row, curves


def equal_loss_distances(own: Curve, base: Curve) -> tuple[float, float]:
    """Return both distances where each run first reaches the higher of the two final losses.

    NaN if one of the runs diverged.
    """
    if not (own.has_finished and base.has_finished):
        return math.nan, math.nan
    loss = max(own.losses[-1], base.losses[-1])
    return own.distance_at(loss), base.distance_at(loss)


def _rounded(value: float) -> float | None:
    """Round to four digits, for JSON, which has no infinite numbers and no NaN."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def ratio(pairs: Sequence[Sequence[float | None]]) -> Estimate:
    """Return the geometric mean of own / base over the pairs without None, with its t-interval."""
    logs = [math.log(own / base) for own, base in pairs if own is not None and base is not None]
    found = over_seeds(logs)
    return Estimate(math.exp(found.mean), math.exp(found.lo), math.exp(found.hi), found.n)


def table_of(rows: list[Row]) -> str:
    """Return a table with the ratios of each mode to its base, paired by seed."""
    header = (
        "noise",
        "κ",
        "steps",
        "",
        "mode",
        "lr",
        "loss",
        "distance",
        "distance / base's",
        "at equal loss",
    )
    cells, base = [], rows[0]
    for row in rows:
        base = row if row["mode"] == "base" else base
        shown = ["", ""]
        if row is not base:
            final = list(zip(row["distances"], base["distances"], strict=True))
            shown = [_format(ratio(pairs)) for pairs in (final, row["at_equal_loss"])]
        names = [f"{row[key]}" for key in (*Setup._fields, "mode")]
        means = [f"{_geometric_mean(row[key]):.2g}" for key in ("losses", "distances")]
        cells.append((*names, f"{row['lr']:g}", *means, *shown))
    return markdown(header, cells)


def _geometric_mean(values: list[float | None]) -> float:
    return math.exp(over_seeds([math.log(value) for value in values if value is not None]).mean)


def _format(found: Estimate) -> str:
    missing = f", {found.n} seeds" if found.n < len(FRESH_SEEDS) else ""
    return f"{found.mean:.2f} [{found.lo:.2f}, {found.hi:.2f}]{missing}"
