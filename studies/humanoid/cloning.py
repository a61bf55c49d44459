"""Train a policy by behaviour cloning: least squares on the expert's states and actions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from optim.schedule import lr_scale
from studies.sweep.optimizers import build, finish, precondition, step
from trainer.evaluation_weights import evaluation_weights

WARMUP_STEPS = 50
OTHER_BATCHES = 1_000_000  # added to the seed of batches that only give Σ
N_HIDDEN = 3  # layers
LOWEST_SCALE = 1e-3  # by which an observation is divided
CLIP_INPUTS = 10.0  # the largest standardized input; forces of rare contacts reach thousands


def spread(actions: np.ndarray) -> float:
    """Return the standard deviation of all numbers in actions (n, 17)."""
    return float(actions.astype(np.float64).std())


@dataclass(frozen=True)
class Scaling:
    """Scale observations to inputs of the network, and its outputs to actions."""

    kept: np.ndarray  # (k,), the observations that vary in the demonstrations
    mean: np.ndarray  # (k,)
    scale: np.ndarray  # (k,)
    action_scale: float
    whiten: np.ndarray | None = None  # (k, k), symmetric; applied after standardization

    @classmethod
    def of(cls, observations: np.ndarray, actions: np.ndarray, whitening: float = 0.0) -> "Scaling":
        """Return the scaling of demonstrations (steps, 348) and (steps, 17).

        With whitening a > 0, standardized inputs with the second moment C, whose mean eigenvalue is
        m, are multiplied by (a C / m + (1 - a) I)^(-1/2).
        """
        kept = np.flatnonzero(np.ptp(observations, axis=0) > 0)
        x = observations[:, kept].astype(np.float64)
        scale = np.maximum(x.std(0), LOWEST_SCALE)
        plain = cls(kept, x.mean(0), scale, spread(actions))
        if not whitening:
            return plain
        z = plain.inputs(observations).double().numpy()  # (steps, k)
        values, vectors = np.linalg.eigh(z.T @ z / len(z))
        mixed = whitening * values.clip(0) / values.mean() + 1 - whitening  # (k,)
        return replace(plain, whiten=(vectors / np.sqrt(mixed)) @ vectors.T)

    def inputs(self, observations: np.ndarray) -> Tensor:  # (n, 348) -> (n, k)
        x = (observations[:, self.kept].astype(np.float64) - self.mean) / self.scale
        x = x.clip(-CLIP_INPUTS, CLIP_INPUTS)
        return torch.as_tensor(x if self.whiten is None else x @ self.whiten, dtype=torch.float32)

    def targets(self, actions: np.ndarray) -> Tensor:  # (n, 17) -> (n, 17)
        return torch.as_tensor(actions / self.action_scale, dtype=torch.float32)


class Clone:
    """A policy: a network of standardized observations."""

    def __init__(self, scaling: Scaling, network: nn.Module) -> None:
        self.scaling, self.network = scaling, network

    @torch.no_grad()
    def __call__(self, observations: np.ndarray) -> np.ndarray:  # (n, 348) -> (n, 17) float32
        return self.network(self.scaling.inputs(observations)).numpy() * self.scaling.action_scale


def make_network(n_inputs: int, n_outputs: int, width: int, seed: int) -> nn.Sequential:
    """Return an MLP with N_HIDDEN hidden layers of GELU units and torch's initialisation."""
    sizes = [n_inputs, *[width] * N_HIDDEN]
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for d_in, d_out in pairwise(sizes):
            layers += [nn.Linear(d_in, d_out), nn.GELU()]
        return nn.Sequential(*layers, nn.Linear(width, n_outputs))


def train_clone(
    observations: np.ndarray,
    actions: np.ndarray,
    *,
    width: int,
    optimizer: str,
    lr: float,
    seed: int,
    steps: int,
    dopr: dict[str, Any],
    batch_size: int = 128,
    own_sigma: bool = True,
    optimizer_args: str = "",
    whitening: float = 0.0,
    ema_decay: float = 0.0,
    first_layer_lr: float | None = None,
    schedule: str = "cosine",
    data_at_step: Mapping[int, Callable[[Clone], tuple[np.ndarray, np.ndarray]]] | None = None,
) -> Clone | None:
    """Return the policy after training; None if the loss became infinite or NaN.

    Args:
        observations, actions: of the expert, (n, 348) and (n, 17).
        optimizer, lr, dopr, optimizer_args: see studies.sweep.optimizers.build.
        seed: seed of the weights and of the batches, the same for all optimizers.
        own_sigma: whether DoPr's Σ is of the batch of the gradient. If not, it is of another batch,
            drawn in every step.
        whitening: of the inputs, see Scaling.of.
        ema_decay: above 0, the policy has an exponential moving average of the weights.
        first_layer_lr: learning rate of the first layer's weight, if it is not `lr`.
        schedule: of the learning rate, see optim.schedule.
        data_at_step: {step: function of the clone at that step}; each function returns further
            observations and actions to train on.
    """
    scaling = Scaling.of(observations, actions, whitening)
    x, y = scaling.inputs(observations), scaling.targets(actions)  # (n, k), (n, 17)
    network = make_network(x.shape[1], y.shape[1], width, seed)
    own_lr = {} if first_layer_lr is None else {"0.weight": first_layer_lr}
    optimizers = build(network, optimizer, lr, {}, optimizer_args, own_lr)
    preconditioner = precondition(network, optimizers, dopr) if dopr else None
    average_of = get_ema_multi_avg_fn(ema_decay)
    average = AveragedModel(network, multi_avg_fn=average_of) if ema_decay else None
    generator = torch.Generator().manual_seed(seed)
    others = torch.Generator().manual_seed(seed + OTHER_BATCHES)
    warmup = min(WARMUP_STEPS, steps // 10)
    lr_scale_at = partial(
        lr_scale, schedule=schedule, warmup_steps=warmup, max_steps=steps, min_lr_ratio=0
    )

    def loss_of(batch: Tensor) -> Tensor:  # (batch_size,), rows of x and y
        return (network(x[batch]) - y[batch]).square().mean()

    for i in range(steps):
        if data_at_step and i in data_at_step:
            with evaluation_weights(optimizers):
                observations, actions = data_at_step[i](Clone(scaling, network))
            x = torch.cat([x, scaling.inputs(observations)])
            y = torch.cat([y, scaling.targets(actions)])
        loss = loss_of(torch.randint(len(x), (batch_size,), generator=generator))
        if not loss.isfinite():
            return None
        if preconditioner and not own_sigma:
            loss_of(torch.randint(len(x), (batch_size,), generator=others)).backward()
            network.zero_grad(set_to_none=False)  # the same gradients, so that DoPr does not warn
            with preconditioner.paused():
                loss.backward()
        else:
            loss.backward()
        step(optimizers, lr_scale_at(i))
        if average:
            average.update_parameters(network)
    finish(optimizers)
    return Clone(scaling, average.module if average else network)
