"""Generate samples: integrate a velocity field from noise, on a fixed grid of times."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

N_STEPS = 64
Field = Callable[[Tensor, Tensor], Tensor]  # points (n, d), times (n,) -> velocities (n, d)


def time_grid(n_steps: int = N_STEPS) -> Tensor:
    """Return the times 0 = t_0 < ... < t_n = 1 with 1 - t = (1 - i/n)²: dense where data is thin.

    Raises ValueError if there is no step.
    """
    if n_steps < 1:
        raise ValueError(f"n_steps={n_steps}: must be at least 1")
    return 1 - (1 - torch.arange(n_steps + 1, dtype=torch.float64) / n_steps) ** 2


@torch.no_grad()
def integrate(field: Field, noise: Tensor, n_steps: int = N_STEPS) -> Tensor:
    """Return x(1) (n, d) of dx/dt = field(x, t) with x(0) = noise (n, d), by Heun's method.

    The state is in the precision of the noise, and every velocity is converted to it.
    """
    x, grid = noise, time_grid(n_steps).tolist()
    for t, after in pairwise(grid):
        h = after - t
        v = field(x, x.new_full((len(x),), t)).to(x.dtype)
        v_after = field(x + h * v, x.new_full((len(x),), after)).to(x.dtype)
        x = x + 0.5 * h * (v + v_after)
    return x
