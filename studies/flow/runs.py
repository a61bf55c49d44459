"""Train and grade one field, and keep the results of all runs in one JSON file."""

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data.files import write_atomic
from studies.flow.grading import Grader, in_float32
from studies.flow.targets import make_target
from studies.flow.training import train_field

MODES: dict[str, dict[str, Any]] = {  # settings of DoPr
    "base": {},
    "fast": {"gamma": 0.1, "refresh_every": 10, "sigma_beta": 0.95},
    "exact": {"gamma": 0.1, "refresh_every": 1},
}


class Run(NamedTuple):
    """What decides the result of a run."""

    target: str
    optimizer: str
    mode: str
    lr: float
    seed: int  # of the instance of the target, the weights and the data
    steps: int


@lru_cache(maxsize=1)
def grader_of(target: str, seed: int) -> Grader:
    return Grader(make_target(target, seed))


def train_and_grade(run: Run) -> dict[str, float] | None:
    """Return the metrics of grading.py; None if the run diverged."""
    grader = grader_of(run.target, run.seed)
    mixture, dopr = grader.target.mixture, MODES[run.mode]
    field = train_field(mixture, run.optimizer, run.lr, run.seed, run.steps, dopr)
    metrics = grader.grade(in_float32(field)) if field else {"excess": math.nan}
    return metrics if all(map(math.isfinite, metrics.values())) else None


class Results:
    """The metrics of finished runs in a JSON file. Runs in the file are not repeated."""

    def __init__(self, path: Path, protocol: dict[str, Any]) -> None:
        """Raises ValueError if the file holds results of another protocol."""
        self.path, self.protocol = path, json.loads(json.dumps(protocol))
        self.metrics: dict[Run, dict[str, float] | None] = {}
        if path.exists():
            found = json.loads(path.read_text())
            if found.get("protocol") != self.protocol:
                raise ValueError(f"{path} holds results of another protocol; use another --out")
            self.metrics = {Run(*key): metrics for key, metrics in found["runs"]}

    def of(self, run: Run) -> dict[str, float] | None:
        """Return the metrics of a run, which is trained if the file lacks it."""
        if run not in self.metrics:
            self.metrics[run] = train_and_grade(run)
            self.save()
        return self.metrics[run]

    def save(self) -> None:
        rows = ",\n".join(json.dumps([run, metrics]) for run, metrics in self.metrics.items())
        text = f'{{"protocol": {json.dumps(self.protocol)},\n"runs": [\n{rows}\n]}}\n'
        write_atomic(self.path, text)


def use_one_thread() -> None:
    """Use one thread, so that results do not depend on the number of cores."""
    torch.set_num_threads(1)
