"""Proximal policy optimization (PPO) of the expert's network, with a left-right mirror."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from studies.humanoid.body import (
    ACTION_ORDER,
    ACTION_SIGNS,
    N_ACTIONS,
    N_COORDINATES,
    ORDER,
    SIGNS,
)
from studies.humanoid.expert import CLIP_INPUTS, WIDTH

FIRST_STD = 0.37  # of the exploration noise in u
GAMMA, LAMBDA = 0.985, 0.95
EPOCHS, MINIBATCH = 5, 1024
CLIP, GRAD_NORM = 0.2, 1.0
FIRST_LR, LOWEST_LR, HIGHEST_LR = 1e-3, 1e-5, 1e-2
KL_TARGET, KL_TOLERANCE, LR_FACTOR = 0.04, 1.5, 1.5


def network(n_outputs: int, scale: float) -> nn.Sequential:
    """Return two hidden layers of ELU units; `scale` multiplies the first outputs."""
    hidden = [nn.Linear(N_COORDINATES, WIDTH), nn.ELU(), nn.Linear(WIDTH, WIDTH), nn.ELU()]
    last = nn.Linear(WIDTH, n_outputs)
    with torch.no_grad():
        last.weight.mul_(scale)
        last.bias.zero_()
    return nn.Sequential(*hidden, last)


class ActorCritic(nn.Module):
    """A Gaussian policy of the commands u and a value function, both averaged over the mirror."""

    mean: Tensor  # (45,)
    scale: Tensor  # (45,)
    order: Tensor  # (45,)
    signs: Tensor  # (45,)
    action_order: Tensor  # (17,)
    action_signs: Tensor  # (17,)

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = network(N_ACTIONS, 0.01), network(1, 1.0)
        self.log_std = nn.Parameter(torch.full((N_ACTIONS,), float(np.log(FIRST_STD))))
        self.register_buffer("order", torch.as_tensor(ORDER))
        self.register_buffer("signs", torch.as_tensor(SIGNS, dtype=torch.float32))
        self.register_buffer("action_order", torch.as_tensor(ACTION_ORDER))
        self.register_buffer("action_signs", torch.as_tensor(ACTION_SIGNS, dtype=torch.float32))
        self.register_buffer("mean", torch.zeros(N_COORDINATES))
        self.register_buffer("scale", torch.ones(N_COORDINATES))

    def _with_mirror_image(self, x: Tensor) -> Tensor:  # (n, 45) -> (2, n, 45)
        both = torch.stack([x, x[:, self.order] * self.signs])
        return ((both - self.mean) / self.scale).clamp(-CLIP_INPUTS, CLIP_INPUTS)

    def policy(self, x: Tensor) -> Normal:
        """Return the distribution of the commands u (n, 17) in the joint states x (n, 45)."""
        u, mirrored = self.actor(self._with_mirror_image(x))
        mean = (u + mirrored[:, self.action_order] * self.action_signs) / 2
        return Normal(mean, self.log_std.exp().expand_as(mean))

    def value(self, x: Tensor) -> Tensor:
        """Return the values of joint states: (..., 45) -> (...)."""
        flat = x.reshape(-1, N_COORDINATES)
        return self.critic(self._with_mirror_image(flat)).mean(0).reshape(x.shape[:-1])

    def expert_arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays from which expert.py makes the mean of this policy."""
        arrays = {"mean": self.mean, "scale": self.scale}
        linears = [layer for layer in self.actor if isinstance(layer, nn.Linear)]
        for i, layer in enumerate(linears):
            arrays |= {f"W{i}": layer.weight, f"b{i}": layer.bias}
        return {name: array.detach().numpy().copy() for name, array in arrays.items()}


@dataclass
class Batch:
    """T steps of n humanoids."""

    x: Tensor  # (T, n, 45), before the step
    u: Tensor  # (T, n, 17)
    reached: Tensor  # (T, n, 45), after the step
    rewards: Tensor  # (T, n)
    fell: Tensor  # (T, n) bool
    ended: Tensor  # (T, n) bool, by a fall or by the limit


@torch.no_grad()
def advantages(model: ActorCritic, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the generalized advantages and the targets of the values: (T, n) each."""
    values = model.value(batch.x)
    errors = batch.rewards + GAMMA * model.value(batch.reached) * ~batch.fell - values
    result, carried = torch.empty_like(values), torch.zeros_like(values[0])
    for t in reversed(range(len(values))):
        carried = errors[t] + GAMMA * LAMBDA * carried * ~batch.ended[t]
        result[t] = carried
    return result, result + values


class Learner:
    """Adam on PPO's clipped objective. The actor's rate follows the KL divergence of an update."""

    def __init__(self, model: ActorCritic, generator: torch.Generator) -> None:
        self.model, self.generator = model, generator
        actor = {"params": [*model.actor.parameters(), model.log_std]}
        critic = {"params": [*model.critic.parameters()]}
        self.optimizer = torch.optim.Adam([actor, critic], lr=FIRST_LR)

    def update(self, batch: Batch) -> None:
        """Take EPOCHS passes over a batch."""
        gains, targets = (each.flatten() for each in advantages(self.model, batch))
        gains = (gains - gains.mean()) / gains.std()
        x, u = batch.x.flatten(0, 1), batch.u.flatten(0, 1)
        with torch.no_grad():
            old = self.model.policy(x)
            log_probs = old.log_prob(u).sum(1)  # (T n,)
        for _ in range(EPOCHS):
            for i in torch.randperm(len(x), generator=self.generator).split(MINIBATCH):
                ratio = (self.model.policy(x[i]).log_prob(u[i]).sum(1) - log_probs[i]).exp()
                clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                loss = -torch.minimum(ratio * gains[i], clipped * gains[i]).mean()
                self._step(loss + (self.model.value(x[i]) - targets[i]).square().mean())
        self._adapt_rate(old, x)

    def _step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], GRAD_NORM)
        self.optimizer.step()

    @torch.no_grad()
    def _adapt_rate(self, old: Normal, x: Tensor) -> None:
        """Lower the actor's rate if the update changed the policy too much, or raise it."""
        kl = float(kl_divergence(old, self.model.policy(x)).sum(1).mean())
        actor = self.optimizer.param_groups[0]
        if kl > KL_TARGET * KL_TOLERANCE:
            actor["lr"] = max(actor["lr"] / LR_FACTOR, LOWEST_LR)
        elif kl < KL_TARGET / KL_TOLERANCE:
            actor["lr"] = min(actor["lr"] * LR_FACTOR, HIGHEST_LR)
