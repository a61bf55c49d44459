"""Behaviour cloning in a linear system: what an optimizer learns of directions that data hide.

The policy K = F G has two linear layers without bias or anything in between; 64 fresh
demonstrations a step, cosine schedule. No transformer, no sampling: grades are exact.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.grade import Curve, Grade
from eval.intervals import Estimate
from eval.lds_plant import Array, Lds
from optim.build import build_optimizers
from optim.dopr import ActivationPreconditioner
from optim.schedule import lr_scale

__all__ = ["Lds", "grade_policy", "train_policy"]

BATCH_SIZE = 64
ACTION_NOISE = 0.03  # standard deviation of what demonstrations add to each action
GAMMA = 1e-3  # of DoPr, where nothing else is said
NUMBERS: dict[str, Any] = {
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "momentum": 0.95,
    "weight_decay": 0.0,
}


def train_policy(
    lds: Lds, optimizer: str, lr: float, seed: int, steps: int = 200, **dopr: Any
) -> Array:
    """The policy K (m, n) after training; NaN if the loss stopped being finite.

    optimizer: a name that `optim.build` knows, with the defaults of train.py, no weight decay.
    seed: of the weights and the demonstrations, the same for all optimizers.
    dopr: settings of ActivationPreconditioner; none: without it. gamma is GAMMA unless given.
    """
    model = _policy(lds, seed)
    optimizers = build_optimizers(model, optimizer=optimizer, lr=lr, **NUMBERS)
    if dopr:
        settings: dict[str, Any] = {"gamma": GAMMA, **dopr}
        ActivationPreconditioner(model, **settings).attach(*optimizers)
    for step, (states, actions) in enumerate(_demonstrations(lds, seed, steps)):
        loss = (model(states) - actions).square().sum(1).mean()
        if not loss.isfinite():
            return np.full_like(lds.expert, np.nan)
        loss.backward()
        scale = lr_scale(step, schedule="cosine", warmup_steps=0, max_steps=steps, min_lr_ratio=0)
        for each in optimizers:
            for group in each.param_groups:
                group["lr"] = group["base_lr"] * scale
            each.step()
            each.zero_grad()
    with torch.no_grad():
        return model(torch.eye(lds.states, dtype=torch.float64)).T.numpy()


def grade_policy(lds: Lds, K: Array) -> Grade:
    """How the policy K (m, n) does in closed loop. Exact, so that intervals have no width.

    val_loss       E‖(K - K*) s‖² on the expert's states
    deviation      E‖s - s*‖² / E‖s*‖² over the horizon, same start, same noise; 1 is 100 %
    cost_ratio     E‖s‖² + E‖K s‖² over the expert's; below 1 is possible, so nothing ranks by it
    A, B, G, gap   as in eval/grade.py, of the squared action error

    A policy that diverges has large numbers, up to inf, and nothing is cut off.
    """
    own, experts = lds.rollouts(K), lds.rollouts(lds.expert)
    steps = np.arange(1, lds.horizon + 1)  # l
    val_loss = lds.val_loss(K)
    A, B = val_loss * steps, own.action_error.cumsum()
    gap = (B - A) / steps if np.isfinite(val_loss) else np.full_like(B, np.inf)
    deviation = own.deviation.mean() / np.trace(lds.sigma)
    with np.errstate(divide="ignore"):  # the expert itself has none
        log10_deviation = np.log10(deviation)
    curves = {"A": A, "B": B, "G": gap}
    values = {
        "val_loss": val_loss,
        "deviation": deviation,
        "log10_deviation": log10_deviation,
        "cost_ratio": own.cost.mean() / experts.cost.mean(),
        "gap": gap[-1],
    }
    return Grade(
        metrics={name: Estimate(*[float(each)] * 3, n=1) for name, each in values.items()},
        curves={name: Curve(*[each.tolist()] * 3) for name, each in curves.items()},
    )


def _policy(lds: Lds, seed: int) -> nn.Sequential:
    """G, then F, with torch's initialisation, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        G = nn.Linear(lds.states, lds.width, bias=False, dtype=torch.float64)
        F = nn.Linear(lds.width, lds.actions, bias=False, dtype=torch.float64)
        return nn.Sequential(G, F)


def _demonstrations(lds: Lds, seed: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of states (64, n) from the expert's stationary law, and its noisy actions (64, m)."""
    random = np.random.default_rng([lds.instance, seed])
    states = random.standard_normal((steps, BATCH_SIZE, lds.states))
    states = states @ np.linalg.cholesky(lds.sigma).T
    noise = ACTION_NOISE * random.standard_normal((steps, BATCH_SIZE, lds.actions))
    actions = states @ lds.expert.T + noise
    return list(zip(torch.from_numpy(states), torch.from_numpy(actions), strict=True))
