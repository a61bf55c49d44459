"""Train linear policies by behaviour cloning in a linear system whose data hide some directions.

    python -m studies.sweep.lds --optimizer dopr-adamw --lr 0.01 --seed 100

repeats one run of a comparison and prints a line with its metrics at full precision.

The policy K = F G consists of two linear layers without biases or nonlinearity. Each step sees 64
new demonstrations; the learning rate follows a cosine. There is no transformer and no sampling, and
the grades are exact.
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
from eval.rollout.record import make_record
from eval.rollout.tasks import TaskError, parse_task
from eval.rollout.tasks.lds import Array, Lds, grade_policy
from optim.schedule import lr_scale
from studies.sweep.optimizers import build, finish, step
from studies.sweep.policy_trial import PolicyTrial
from studies.sweep.variants import Variant, parse_dopr_variant
from trainer.metrics import environment

BATCH_SIZE = 64
ACTION_NOISE = 0.03  # standard deviation of the noise in each demonstrated action
DOPR_NUMBERS = {"gamma", "sigma_beta", "refresh_every", "collect_every", "exponent"}


def parse_lds_variant(name: str) -> Variant:
    """Return the variant with that name. Raises ValueError as `parse_dopr_variant`."""
    return parse_dopr_variant(name, Lds.name, DOPR_NUMBERS)


class LdsTrial(PolicyTrial):
    """A linear policy, trained and graded in this process without train.py."""

    task_name = Lds.name
    parse_variant = staticmethod(parse_lds_variant)

    def make(self) -> dict[str, Any]:
        steps = self.settings["max_steps"]
        K = train_variant(self.task, self.settings, self.lr, self.seed, steps)
        grade = grade_policy(self.task, K)
        settings = self.settings | {"lr": self.lr, "seed": self.seed}
        return make_record(
            self.task,
            settings | {"batch_size": BATCH_SIZE, "block_size": 1},
            steps=steps,
            val_loss=grade.metrics["val_loss"].mean,
            grade=grade.to_json(),
            command=command_of(self.task, self.variant, self.lr, self.seed, steps),
            environment=environment(torch.device("cpu")),
        )


def train_variant(lds: Lds, settings: dict[str, Any], lr: float, seed: int, steps: int) -> Array:
    """Call `train_policy` with the settings of a variant."""
    dopr = {key: value for key, value in settings.items() if key in DOPR_NUMBERS}
    arguments = settings.get("optimizer_args", "")
    return train_policy(lds, settings["optimizer"], lr, seed, steps, arguments, **dopr)


def command_of(lds: Lds, variant: str, lr: float, seed: int, steps: int) -> str:
    """Return the command that repeats a run."""
    words = ["--task", lds.spec, "--optimizer", variant, "--lr", lr, "--seed", seed]
    return shlex.join(
        ["python", "-m", "studies.sweep.lds", *map(str, words), "--steps", str(steps)]
    )


def train_policy(
    lds: Lds,
    optimizer: str,
    lr: float,
    seed: int,
    steps: int = 200,
    optimizer_args: str = "",
    **dopr: Any,
) -> Array:
    """Return the policy K (m, n) after training; NaN if the loss became infinite or NaN.

    Args:
        optimizer, lr, dopr, optimizer_args: see studies.sweep.optimizers.build.
        seed: seed of the weights and of the demonstrations, the same for all optimizers.
    """
    model = _policy(lds, seed)
    optimizers = build(model, optimizer, lr, dopr, optimizer_args)
    for i, (states, actions) in enumerate(_demonstrations(lds, seed, steps)):
        loss = (model(states) - actions).square().sum(1).mean()
        if not loss.isfinite():
            return np.full_like(lds.expert, np.nan)
        loss.backward()
        scale = lr_scale(i, schedule="cosine", warmup_steps=0, max_steps=steps, min_lr_ratio=0)
        step(optimizers, scale)
    finish(optimizers)
    with torch.no_grad():
        return model(torch.eye(lds.states, dtype=torch.float64)).T.numpy()


def _policy(lds: Lds, seed: int) -> nn.Sequential:
    """Return the layers G and F in float64, with the initialisation of torch.nn.Linear."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        G = nn.Linear(lds.states, lds.width, bias=False, dtype=torch.float64)
        F = nn.Linear(lds.width, lds.actions, bias=False, dtype=torch.float64)
        return nn.Sequential(G, F)


def _demonstrations(lds: Lds, seed: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Draw batches of the expert's stationary states (64, n) and of its noisy actions (64, m)."""
    random = np.random.default_rng([lds.instance, 3, seed])  # streams 0, 1 and 2 draw the plant
    states = random.standard_normal((steps, BATCH_SIZE, lds.states))
    states = states @ np.linalg.cholesky(lds.sigma).T
    noise = ACTION_NOISE * random.standard_normal((steps, BATCH_SIZE, lds.actions))
    actions = states @ lds.expert.T + noise
    return list(zip(torch.from_numpy(states), torch.from_numpy(actions), strict=True))


def main(argv: list[str]) -> None:
    parser = command_parser("studies.sweep.lds", __doc__)
    add = parser.add_argument
    add("--task", default="lds", help="lds,knob=value,...; the instance defaults to the seed")
    add("--optimizer", required=True, help="see studies/sweep/variants.py")
    add("--lr", type=float, required=True)
    add("--seed", type=int, default=0, help="seed of the weights and the demonstrations")
    add("--steps", type=int, default=200)
    arguments = parser.parse_args(argv)
    try:
        print(_repeat(arguments))
    except (TaskError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")


def _repeat(arguments: argparse.Namespace) -> str:
    """Return a line with the metrics of the run that the command line describes."""
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
