"""Change the gradients of a run of train.py, to find out which part of DoPr lowers the loss.

The rules are written here from the definition, without optim/dopr: hooks collect the inputs z of
every linear layer in the forward and change its gradient G just before the optimizer's step. Their
rule "exact" is DoPr's exact mode, which a test checks.

    μ = E[z],   C = E[z zᵀ] - μ μᵀ,   m = (tr C + μᵀ μ) / d
    M = m G (C + μ μᵀ + γ m I)^-1
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from data.files import write_atomic
from studies.sweep.variants import FAST_DOPR

GAMMA = 0.1
EVERY = FAST_DOPR["refresh_every"]  # steps between two refreshes
BETA = FAST_DOPR["sigma_beta"]  # of the average over refreshes


@dataclass
class Moments:
    """The moments of the inputs of one layer in one step, and those of earlier steps."""

    mean: Tensor  # (d,) float64
    C: Tensor  # (d, d) float64
    previous_mean: Tensor  # of the step before; in the first step, `mean`
    refreshed_mean: Tensor  # of the last step whose number is a multiple of EVERY
    averaged_mean: Tensor  # average over those steps
    averaged_covariance: Tensor

    @property
    def mean_eigenvalue(self) -> Tensor:  # m
        return (self.C.trace() + self.mean @ self.mean) / len(self.mean)

    def whiten(self, G: Tensor, mean: Tensor, C: Tensor | None = None) -> Tensor:
        """Return m G (C + μ μᵀ + γ m I)^-1 for another μ or another C, and this layer's m."""
        C = self.C if C is None else C
        m = self.mean_eigenvalue
        damped = C + torch.outer(mean, mean) + GAMMA * m * torch.eye(len(C), dtype=C.dtype)
        return m * torch.linalg.solve(damped, G, left=False)


def _without(G: Tensor, mean: Tensor) -> Tensor:
    """Return G without its component along the mean."""
    unit = mean / mean.norm()
    return G - torch.outer(G @ unit, unit)


def rotated(mean: Tensor, degrees: float) -> Tensor:
    """Rotate the mean by an angle, towards a random direction."""
    other = _without(torch.randn(1, len(mean), dtype=mean.dtype), mean)[0]
    angle = math.radians(degrees)
    return math.cos(angle) * mean + math.sin(angle) * mean.norm() * other / other.norm()


Rule = Callable[[Tensor, Moments], Tensor]  # (G, moments) -> M
RULES: dict[str, Rule] = {
    "base": lambda G, z: G,
    "exact": lambda G, z: z.whiten(G, z.mean),
    "stale mean": lambda G, z: z.whiten(G, z.previous_mean),
    "no mean": lambda G, z: z.whiten(G, torch.zeros_like(z.mean)),
    "mean alone": lambda G, z: z.whiten(G, z.mean, torch.eye(len(z.C)) * z.C.trace() / len(z.C)),
    "averaged C": lambda G, z: z.whiten(G, z.mean, z.averaged_covariance),
    "averaged mean": lambda G, z: z.whiten(G, z.averaged_mean),
    "mean removed": lambda G, z: _without(G, z.mean),
    "stale mean removed": lambda G, z: _without(G, z.previous_mean),
    **{f"rotated {a:g}": lambda G, z, a=a: z.whiten(G, rotated(z.mean, a)) for a in (1, 3, 10, 30)},
}


@dataclass
class Intervention:
    """A context in which every linear layer of a training run gets its M from a rule.

    `measured` then has a row for every layer in every tenth step.
    """

    rule: Rule
    measured: list[dict[str, Any]] = field(default_factory=list)

    def __enter__(self) -> "Intervention":
        self._inputs: dict[nn.Linear, list[Tensor]] = {}
        self._moments: dict[nn.Linear, Moments] = {}
        self._step = 0
        self._hooks = [
            register_module_forward_pre_hook(self._collect),
            register_optimizer_step_pre_hook(self._change),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _collect(self, module: nn.Module, args: Any) -> None:
        if isinstance(module, nn.Linear) and torch.is_grad_enabled():
            self._inputs.setdefault(module, []).append(args[0].detach().flatten(0, -2))

    @torch.no_grad()
    def _change(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._step)
            for i, (layer, inputs) in enumerate(self._inputs.items()):
                assert layer.weight.grad is not None
                z = self._moments[layer] = self._new_moments(layer, torch.cat(inputs))
                G = layer.weight.grad.double()
                M = self.rule(G, z)
                if self._step % EVERY == EVERY - 1:
                    self.measured.append({"step": self._step, "layer": i, **measure(G, z)})
                layer.weight.grad.copy_(M)
        self._inputs.clear()
        self._step += 1

    def _new_moments(self, layer: nn.Linear, z: Tensor) -> Moments:  # z (n, d)
        mean = z.double().mean(0)
        S = (z.mT @ z).double() / len(z)
        C = S - torch.outer(mean, mean)
        old = self._moments.get(layer)
        if old is None:
            return Moments(mean, C, mean, mean, mean, C)
        older = old.refreshed_mean, old.averaged_mean, old.averaged_covariance
        if self._step % EVERY == 0:
            n = self._step // EVERY + 1  # refreshes
            weight = (1 - BETA) / (1 - BETA**n)  # corrects the bias of the average
            older = (
                mean,
                old.averaged_mean.lerp(mean, weight),
                old.averaged_covariance.lerp(C, weight),
            )
        return Moments(mean, C, old.mean, *older)


def measure(G: Tensor, z: Moments) -> dict[str, float]:
    """Return the numbers that the explanation needs, of one layer in one step.

    mean_share      share of tr(Σ) that μ μᵀ has
    gradient_share  share of ‖G‖² along μ
    suppression     1 + μᵀ K μ for K = (C + γ m I)^-1: DoPr divides the part of G along μ by it
    turn, turn_10   angle in degrees between μ and that of the step before; of the last refresh
    leak, leak_10   ‖μᵀ P'‖ / ‖μᵀ P‖, where P' contains the older mean: how much more of the part of
                    G along μ passes
    """
    along = G @ (z.mean / z.mean.norm())
    row = z.mean[None]
    fresh = z.whiten(row, z.mean).norm()
    no_mean = z.whiten(row, torch.zeros_like(z.mean))
    return {
        "mean_share": float(z.mean @ z.mean / (z.C.trace() + z.mean @ z.mean)),
        "gradient_share": float(along.square().sum() / G.square().sum()),
        "suppression": float(1 + no_mean[0] @ z.mean / z.mean_eigenvalue),
        "turn": _degrees(z.mean, z.previous_mean),
        "turn_10": _degrees(z.mean, z.refreshed_mean),
        "leak": float(z.whiten(row, z.previous_mean).norm() / fresh),
        "leak_10": float(z.whiten(row, z.refreshed_mean).norm() / fresh),
    }


def _degrees(a: Tensor, b: Tensor) -> float:
    """Return the angle between two vectors, exact also where it is small."""
    a, b = a / a.norm(), b / b.norm()
    return math.degrees(2 * math.asin(min(1.0, float((a - b).norm()) / 2)))


def folder_of(runs: Path, rule: str, lr: float, seed: int) -> Path:
    """Return the folder of one run."""
    return runs / f"{rule.replace(' ', '-')}_lr={lr:g}_seed={seed}"


def kept(folder: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Return the stored result of a run; if there is none, make it in an empty folder and store it.

    A run that was stopped begins again, because a checkpoint holds no moments of earlier steps.
    """
    path = folder / "result.json"
    if not path.exists():
        shutil.rmtree(folder, ignore_errors=True)
        write_atomic(path, json.dumps(make(folder)))
    return json.loads(path.read_text())
