"""Behaviour cloning in a linear system: what an optimizer learns of directions that data hide.

The policy K = F G has two linear layers without bias or anything in between; 64 fresh
demonstrations a step, cosine schedule. No transformer, no sampling: grades are exact.

    python -m studies.sweep.lds --optimizer dopr-adamw --lr 0.01 --seed 100

makes one run of a comparison again: a line with its metrics, at full precision.
"""

import argparse
import math
import shlex
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.command import command_parser
from eval.rollout.tasks import TaskError, parse_task
from eval.rollout.tasks.lds import Array, Lds, grade_policy
from optim.build import build_optimizers
from optim.dopr.preconditioner import ActivationPreconditioner
from optim.schedule import lr_scale
from studies.sweep.variants import Variant, parse_variant
from trainer.settings import FIELDS

BATCH_SIZE = 64
ACTION_NOISE = 0.03  # standard deviation of what demonstrations add to each action
DOPR_NUMBERS = {"gamma", "sigma_beta", "refresh_every", "collect_every", "exponent"}
NUMBERS: dict[str, Any] = {
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "momentum": 0.95,
    "weight_decay": 0.0,
}


def parse_lds_variant(name: str) -> Variant:
    """The variant of that name.

    Raises ValueError if it changes something that this task has not: only DoPr has numbers here.
    """
    variant = parse_variant(name)
    settings = dict(variant.settings)
    known = DOPR_NUMBERS if settings["dopr"] else set()
    if unknown := sorted(settings.keys() - known - {"optimizer", "dopr"}):
        raise ValueError(
            f"optimizer {name!r}: task lds has no {', '.join(unknown)} there; "
            f"only DoPr's {', '.join(sorted(DOPR_NUMBERS))} can be changed"
        )
    return variant


def train_variant(lds: Lds, settings: dict[str, Any], lr: float, seed: int, steps: int) -> Array:
    """`train_policy` with the settings of a variant."""
    dopr = {key: value for key, value in settings.items() if key in DOPR_NUMBERS}
    return train_policy(lds, settings["optimizer"], lr, seed, steps, **dopr)


def command_of(lds: Lds, variant: str, lr: float, seed: int, steps: int) -> str:
    """What makes a run again."""
    words = ["--task", lds.spec, "--optimizer", variant, "--lr", lr, "--seed", seed]
    return shlex.join(
        ["python", "-m", "studies.sweep.lds", *map(str, words), "--steps", str(steps)]
    )


def train_policy(
    lds: Lds, optimizer: str, lr: float, seed: int, steps: int = 200, **dopr: Any
) -> Array:
    """The policy K (m, n) after training; NaN if the loss stopped being finite.

    optimizer: a name that `optim.build` knows, with the defaults of train.py, no weight decay.
    seed: of the weights and the demonstrations, the same for all optimizers.
    dopr: settings of ActivationPreconditioner; none: without it. gamma as in train.py.
    """
    model = _policy(lds, seed)
    optimizers = build_optimizers(model, optimizer=optimizer, lr=lr, **NUMBERS)
    if dopr:
        settings: dict[str, Any] = {"gamma": FIELDS["gamma"].default, **dopr}
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


def _policy(lds: Lds, seed: int) -> nn.Sequential:
    """G, then F, with torch's initialisation, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        G = nn.Linear(lds.states, lds.width, bias=False, dtype=torch.float64)
        F = nn.Linear(lds.width, lds.actions, bias=False, dtype=torch.float64)
        return nn.Sequential(G, F)


def _demonstrations(lds: Lds, seed: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of states (64, n) from the expert's stationary law, and its noisy actions (64, m)."""
    random = np.random.default_rng([lds.instance, 3, seed])  # 0, 1, 2: the plant's
    states = random.standard_normal((steps, BATCH_SIZE, lds.states))
    states = states @ np.linalg.cholesky(lds.sigma).T
    noise = ACTION_NOISE * random.standard_normal((steps, BATCH_SIZE, lds.actions))
    actions = states @ lds.expert.T + noise
    return list(zip(torch.from_numpy(states), torch.from_numpy(actions), strict=True))


def main(argv: list[str]) -> None:
    parser = command_parser("studies.sweep.lds", __doc__)
    add = parser.add_argument
    add("--task", default="lds", help="lds,knob=value,...; without an instance: that of the seed")
    add("--optimizer", required=True, help="see studies/sweep/variants.py")
    add("--lr", type=float, required=True)
    add("--seed", type=int, default=0, help="of the weights and the demonstrations")
    add("--steps", type=int, default=200)
    arguments = parser.parse_args(argv)
    try:
        print(_repeat(arguments))
    except (TaskError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")


def _repeat(arguments: argparse.Namespace) -> str:
    """One line: the metrics of the run that the command line describes."""
    lr, seed, steps = arguments.lr, arguments.seed, arguments.steps
    if not 0 < lr < math.inf or seed < 0 or steps < 1:
        raise ValueError("--lr must be positive and finite, --seed at least 0, --steps at least 1")
    has_instance = "instance=" in arguments.task
    spec = arguments.task if has_instance else f"{arguments.task},instance={seed}"
    lds = parse_task(spec, {Lds.name: Lds})
    settings = dict(parse_lds_variant(arguments.optimizer).settings)
    means = grade_policy(lds, train_variant(lds, settings, lr, seed, steps)).means()
    numbers = "  ".join(f"{name} {value!r}" for name, value in means.items())
    return f"{arguments.optimizer}  lr {lr:g}  seed {seed}  {numbers}"


if __name__ == "__main__":
    main(sys.argv[1:])
