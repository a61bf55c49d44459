"""Define the rollout error of a run, whose logarithm the studies compare; lower is better.

The error follows from the metric that ranks. It is the metric itself if the metric should be low,
and what is missing to the best value if it should be high. Differences of logarithms of errors are
logarithms of ratios.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Record = dict[str, Any]
SHARES = ("failure", "success", "survival")  # metrics that are shares of the episodes
LOG10 = "log10_"  # prefix of metrics that are logarithms of an error


def metric(record: Record, name: str) -> float:
    """Return a metric of a run; NaN if it is not finite or the run diverged."""
    value = record["grade"] and record["grade"]["metrics"][name]["mean"]
    return math.nan if value is None else value


def primary(record: Record) -> float:
    """Return the metric that ranks; NaN if the run diverged."""
    return metric(record, record["primary"])


@dataclass(frozen=True)
class RolloutError:
    """The error of a metric that should be low: the metric itself."""

    source: str  # the metric of a grade that determines the error
    is_share: bool = False  # whether the error is between 0 and 1, so that it has odds

    def formula(self, label: str) -> str:
        """Say how the error follows from the metric with this label; "" if it is the metric."""
        return ""

    def of(self, record: Record) -> float:
        """Return the error of a run; NaN if the run diverged."""
        return metric(record, self.source)

    def log(self, record: Record) -> float:
        """Return the logarithm of the error; NaN if it does not exist.

        No error in n episodes counts as half an error in n + 1.
        """
        error = self.of(record)
        if error == 0:
            error = half_an_episode(record)
        return math.log(error) if error > 0 else math.nan

    def to_metric(self, error: np.ndarray, record: Record) -> np.ndarray:
        """Convert errors to values of the metric that ranks `record`."""
        return error


class Complement(RolloutError):
    """The error of a metric that should be high: its difference from 1."""

    def formula(self, label: str) -> str:
        return f"1 − {label}"

    def of(self, record: Record) -> float:
        return 1 - super().of(record)

    def to_metric(self, error: np.ndarray, record: Record) -> np.ndarray:
        return 1 - error


class Shortfall(RolloutError):
    """The error of a return: the part of the expert's return that is missing.

    See studies/humanoid/task.py. It may be negative, and counts as at least half an episode.
    """

    def formula(self, label: str) -> str:
        return "1 − return / expert’s return"

    def log(self, record: Record) -> float:
        error = self.of(record)
        return math.nan if math.isnan(error) else math.log(max(error, half_an_episode(record)))

    def to_metric(self, error: np.ndarray, record: Record) -> np.ndarray:
        expert_return = primary(record) / (1 - self.of(record))
        return expert_return * (1 - error)


class Power(RolloutError):
    """The error of a metric that is a logarithm already: ten to the power of it."""

    def formula(self, label: str) -> str:
        return f"the {label.removeprefix('log10 ')} itself"

    def of(self, record: Record) -> float:
        return 10 ** super().of(record)

    def log(self, record: Record) -> float:
        return super().of(record) * math.log(10)

    def to_metric(self, error: np.ndarray, record: Record) -> np.ndarray:
        return np.log10(error)


def error_of_metric(name: str, *, higher_is_better: bool) -> RolloutError:
    """Return how the rollout error follows from the metric that ranks."""
    if name == "return":
        return Shortfall("shortfall", is_share=True)
    if name.startswith(LOG10):
        return Power(name)
    return (Complement if higher_is_better else RolloutError)(name, name in SHARES)


def error_of(record: Record) -> RolloutError:
    """Return how the rollout error follows from the metric that ranks a run."""
    return error_of_metric(record["primary"], higher_is_better=record["higher_is_better"])


def log_error(record: Record) -> float:
    """Return the logarithm of the rollout error; NaN if the run diverged."""
    return error_of(record).log(record)


def half_an_episode(record: Record) -> float:
    """Return the share that replaces "none of n episodes": half an episode in n + 1."""
    return 0.5 / (record["grade"]["metrics"][record["primary"]]["n"] + 1)
