"""Define the data of the study: ill-conditioned mixtures, and a thin curve in a subspace.

cond-C    a mixture of 8 Gaussians with unit total variance, stretched along random orthogonal
          axes. The variances along the axes go from 1/√C to √C, equally spaced in the logarithm.
curve     a closed curve in 3 dimensions, embedded by a random linear map, as a mixture of 40
          Gaussians that are long along the curve and thin in all other directions. The mean
          variance of a coordinate is 1.

A seed draws the instance: axes, means and the linear map.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from studies.flow.mixture import Mixture

DIMENSIONS = 16
N_MODES = 8
MODE_SHARE = 0.36  # of the variance of a mixture that is inside its modes
N_SEGMENTS = 40  # Gaussians along the curve
THICKNESS = 0.02  # standard deviation of the data across the curve
N_CURVE = 2400  # points of the curve from which distances are measured


@dataclass(frozen=True)
class Target:
    """One instance of the data."""

    mixture: Mixture
    curve: Tensor | None  # (N_CURVE, d), points of the curve, if there is one


def make_target(name: str, seed: int) -> Target:
    """Return an instance of the data with that name.

    Raises ValueError if the name is unknown or the condition number below 1.
    """
    if seed < 0:
        raise ValueError(f"seed={seed}: must be at least 0")
    generator = torch.Generator().manual_seed(seed)
    if name == "curve":
        return _curve(generator)
    kind, _, text = name.partition("-")
    try:
        condition = float(text) if kind == "cond" else math.nan
    except ValueError:
        condition = math.nan
    if not 1 <= condition < math.inf:
        raise ValueError(f"target {name!r}: expected curve or cond-C with a number C >= 1")
    return Target(_stretched(condition, generator), None)


def _stretched(condition: float, generator: torch.Generator) -> Mixture:
    """Return a mixture whose covariance has about this condition number."""
    spread = 0.5 * math.log(condition)
    scale = torch.linspace(-spread, spread, DIMENSIONS, dtype=torch.float64).exp()  # variances
    axes = torch.linalg.qr(_normal(generator, DIMENSIONS, DIMENSIONS)).Q
    root = axes * scale.sqrt()  # (d, d)
    means = math.sqrt(1 - MODE_SHARE) * _normal(generator, N_MODES, DIMENSIONS) @ root.T
    covariance = MODE_SHARE * root @ root.T
    return Mixture.of(means, covariance.expand(N_MODES, DIMENSIONS, DIMENSIONS))


def _curve(generator: torch.Generator) -> Target:
    """Return a mixture along the embedded curve (cos a, sin a, cos 3a)."""
    embedding = _normal(generator, DIMENSIONS, 3)  # (d, 3)
    points, _ = _trace(N_CURVE)
    centred = points @ embedding.T
    embedding = embedding / centred.square().mean().sqrt()
    means, tangents = (each @ embedding.T for each in _trace(N_SEGMENTS))  # (K, d) each
    half = tangents * math.pi / N_SEGMENTS  # half of the way from one mean to the next
    covariances = half[:, :, None] * half[:, None, :]
    covariances = covariances + THICKNESS**2 * torch.eye(DIMENSIONS, dtype=torch.float64)
    return Target(Mixture.of(means, covariances), points @ embedding.T)


def _trace(n: int) -> tuple[Tensor, Tensor]:
    """Return n points of the curve (n, 3) and their derivatives by the angle (n, 3)."""
    a = torch.from_numpy(np.linspace(0, 2 * math.pi, n, endpoint=False))
    points = torch.stack([a.cos(), a.sin(), (3 * a).cos()], 1)
    return points, torch.stack([-a.sin(), a.cos(), -3 * (3 * a).sin()], 1)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
