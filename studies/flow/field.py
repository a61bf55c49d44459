"""Define the learned velocity field: an MLP of the point and of features of the time."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

WIDTH = 64
N_HIDDEN = 3  # layers
FREQUENCIES = (1, 2, 4, 8)  # of the time features, in half turns


class VelocityField(nn.Module):
    """Map points x (n, d) and times t (n,) to velocities (n, d)."""

    def __init__(self, dimensions: int, seed: int) -> None:
        """Initialise the weights with `seed`, as torch does by default."""
        super().__init__()
        n_features = dimensions + 1 + 2 * len(FREQUENCIES)
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for d_in, d_out in pairwise([n_features, *[WIDTH] * N_HIDDEN]):
                layers += [nn.Linear(d_in, d_out), nn.GELU()]
            self.layers = nn.Sequential(*layers, nn.Linear(WIDTH, dimensions))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = math.pi * t[:, None] * torch.tensor(FREQUENCIES, dtype=x.dtype)  # (n, f)
        return self.layers(torch.cat([x, t[:, None], angles.sin(), angles.cos()], 1))
