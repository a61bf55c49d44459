"""Train and grade one field, and keep the results of all runs in one JSON file."""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from studies.flow.comparison import Metrics
from studies.flow.grading import Grader, in_float32
from studies.flow.targets import make_target
from studies.flow.training import train_field
from studies.rows import Results
from studies.sweep.variants import EXACT_DOPR, FAST_DOPR

MODES: dict[str, dict[str, Any]] = {  # settings of DoPr
    "base": {},
    "fast": {"gamma": 0.1} | FAST_DOPR,
    "exact": {"gamma": 0.1} | EXACT_DOPR,
}


class Run(NamedTuple):
    """The settings that determine the result of a run."""

    target: str
    optimizer: str
    mode: str
    lr: float
    seed: int  # of the instance of the target, the weights and the data
    steps: int


@lru_cache(maxsize=1)
def grader_of(target: str, seed: int) -> Grader:
    return Grader(make_target(target, seed))


def train_and_grade(run: Run) -> Metrics:
    """Return the metrics of grading.py; None if the run diverged."""
    grader = grader_of(run.target, run.seed)
    mixture, dopr = grader.target.mixture, MODES[run.mode]
    field = train_field(mixture, run.optimizer, run.lr, run.seed, run.steps, dopr)
    metrics = grader.grade(in_float32(field)) if field else {"excess": math.nan}
    return metrics if all(map(math.isfinite, metrics.values())) else None


class FlowResults(Results[Run, Metrics]):
    """The metrics of finished runs in a JSON file; None for a run that diverged."""

    list_name = "runs"
    optimizers = ("adamw", "muon")

    def make(self, run: Run) -> Metrics:
        return train_and_grade(run)

    def encode(self, run: Run, value: Metrics) -> Any:
        return [run, value]

    def decode(self, entry: Any) -> tuple[Run, Metrics]:
        return Run(*entry[0]), entry[1]


def use_one_thread() -> None:
    """Use one thread, so that results do not depend on the number of cores."""
    torch.set_num_threads(1)
