"""Train a velocity field by conditional flow matching: regression on x_1 - x_0 at a random time."""

from typing import Any

import torch
from torch import Tensor

from optim.schedule import lr_scale
from studies.flow.field import VelocityField
from studies.flow.mixture import Mixture
from studies.sweep.optimizers import build, step

BATCH_SIZE = 256
WARMUP_STEPS = 25
CHUNK = 128  # steps whose data are drawn together


def train_field(
    mixture: Mixture, optimizer: str, lr: float, seed: int, steps: int, dopr: dict[str, Any]
) -> VelocityField | None:
    """Return the field after training; None if the loss became infinite or NaN.

    Every step sees new data. The learning rate follows a cosine to zero.

    Args:
        optimizer, lr, dopr: see studies.sweep.optimizers.build.
        seed: seed of the weights and of the data, the same for all optimizers and lengths.
    Raises:
        ValueError: the number of steps is not positive, or an argument of `build` is invalid.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: must be at least 1")
    field = VelocityField(mixture.dimensions, seed)
    optimizers = build(field, optimizer, lr, dopr)
    generator = torch.Generator().manual_seed(seed)
    schedule = {"schedule": "cosine", "warmup_steps": min(WARMUP_STEPS, steps // 10)}
    for i in range(steps):
        if i % CHUNK == 0:
            chunk = [each.split(BATCH_SIZE) for each in draw_pairs(mixture, CHUNK, generator)]
        x, t, velocity = (each[i % CHUNK] for each in chunk)
        loss = (field(x, t) - velocity).square().mean()
        if not loss.isfinite():
            return None
        loss.backward()
        step(optimizers, lr_scale(i, max_steps=steps, min_lr_ratio=0, **schedule))
    return field


def draw_pairs(
    mixture: Mixture, n_batches: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw points x_t (n, d), times t (n,) and conditional velocities x_1 - x_0 (n, d), float32."""
    n = n_batches * BATCH_SIZE
    x1 = mixture.sample(n, generator)
    x0 = torch.randn(x1.shape, generator=generator, dtype=torch.float64)
    t = torch.rand(n, generator=generator, dtype=torch.float64)
    x = torch.lerp(x0, x1, t[:, None])
    return x.float(), t.float(), (x1 - x0).float()
