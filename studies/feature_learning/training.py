"""Train the two layers on fresh batches; record the loss and the distance from the features."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from optim.schedule import lr_scale
from studies.feature_learning.task import FEATURES, INPUTS, OUTPUTS, Task, distance
from studies.sweep.optimizers import build, step

BATCH_SIZE, RECORD_EVERY = 128, 5


@dataclass(frozen=True)
class Curve:
    """The course of one run, recorded before the first step and after every RECORD_EVERY steps."""

    steps: int  # that the run was to take
    losses: list[float]  # expected loss less that of the true model
    distances: list[float]

    @property
    def has_finished(self) -> bool:
        """Whether the run did not diverge."""
        return len(self.losses) == 1 + self.steps // RECORD_EVERY and math.isfinite(self.losses[-1])

    def distance_at(self, loss: float) -> float:
        """Return the distance where the loss first falls to `loss`; NaN if it never does.

        Interpolates the logarithms between two records.
        """
        reached = [i for i, each in enumerate(self.losses) if each <= loss]
        if not reached:
            return math.nan
        i = reached[0]
        around = slice(max(i - 1, 0), i + 1)
        x, y = (np.log(each[around])[::-1] for each in (self.losses, self.distances))
        return float(np.exp(np.interp(math.log(loss), x, y)))


def make_model(seed: int) -> nn.Sequential:
    """Return the layers G and F in float64, with the initialisation of torch.nn.Linear."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        G = nn.Linear(INPUTS, FEATURES, bias=False, dtype=torch.float64)
        F = nn.Linear(FEATURES, OUTPUTS, bias=False, dtype=torch.float64)
        return nn.Sequential(G, F)


def train(
    task: Task, optimizer: str, lr: float, seed: int, dopr: dict[str, Any], steps: int = 100
) -> Curve:
    """Return the course of a run. It ends early if the loss becomes infinite or NaN.

    Args:
        optimizer, lr, dopr: see studies.sweep.optimizers.build.
        seed: seed of the weights and the batches, the same for all optimizers.
    """
    generator = torch.Generator().manual_seed(seed)
    model = make_model(seed + 1)
    optimizers = build(model, optimizer, lr, dopr)
    curve = Curve(steps, [], [])
    _record(curve, task, model)
    for i in range(steps):
        x, y = task.draw(BATCH_SIZE, generator)
        loss = (model(x) - y).square().sum(1).mean() / 2
        if not loss.isfinite():
            return curve
        loss.backward()
        scale = lr_scale(i, schedule="cosine", warmup_steps=0, max_steps=steps, min_lr_ratio=0)
        step(optimizers, scale)
        if (i + 1) % RECORD_EVERY == 0:
            _record(curve, task, model)
    return curve


def _record(curve: Curve, task: Task, model: nn.Sequential) -> None:
    G, F = (parameter.detach() for parameter in model.parameters())
    is_finite = bool(G.isfinite().all())
    curve.losses.append(task.loss(F, G))
    curve.distances.append(distance(G, task.G) if is_finite else math.nan)
