"""Train linear policies by behaviour cloning in a linear system whose data hide some directions.

    python -m studies.sweep.lds --optimizer dopr-adamw --lr 0.01 --seed 100

repeats one run of a comparison and prints a line with its metrics at full precision.

The policy K = F G consists of two linear layers without biases or nonlinearity. Each step sees 64
new demonstrations; the learning rate follows a cosine. There is no transformer and no sampling, and
the grades are exact.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from eval.rollout.metrics import Grade
from eval.rollout.tasks.lds import Array, Lds, grade_policy
from optim.schedule import lr_scale
from studies.sweep.optimizers import build, finish, step
from studies.sweep.policy_trial import PolicyTrial

BATCH_SIZE = 64
ACTION_NOISE = 0.03  # standard deviation of the noise in each demonstrated action


class LdsTrial(PolicyTrial):
    """A linear policy."""

    module = "studies.sweep.lds"
    task_type = Lds
    default_steps = 200
    dopr_settings: ClassVar = {
        *("gamma", "sigma_beta", "refresh_every", "collect_every", "exponent"),
    }

    @property
    def batch_size(self) -> int:
        return BATCH_SIZE

    def train_and_grade(self) -> Grade:
        """Train the policy and return its exact grade, which is infinite if training diverged."""
        dopr = {key: self.settings[key] for key in self.dopr_settings if key in self.settings}
        settings = self.settings
        K = train_policy(
            self.task,
            settings["optimizer"],
            self.lr,
            self.seed,
            settings["max_steps"],
            settings.get("optimizer_args", ""),
            **dopr,
        )
        return grade_policy(self.task, K)


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


def main(argv: list[str] | None = None) -> None:
    LdsTrial.repeat(argv, __doc__)


if __name__ == "__main__":
    main()
