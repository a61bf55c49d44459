"""Grade a velocity field: its excess loss on data, and the samples that it generates.

excess     E|v - v*|² on fixed points of the path, the loss beyond that of the exact field v*
paired     E|x(1) - x*(1)|²: samples of v and of v* from the same noise; zero if v = v*
sliced     squared sliced 2-Wasserstein distance between samples of v and true samples
off_curve  mean squared distance of samples of v to the curve, for targets that have one
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from studies.flow.sampling import Field, integrate
from studies.flow.targets import Target
from studies.flow.training import BATCH_SIZE, draw_pairs

GRADING_SEED = 1_000_000  # no run has it
N_VALIDATION = 8192
N_SAMPLES = 1024
N_DIRECTIONS = 64


class Grader:
    """Grade fields on one instance of the data, always with the same points and noise."""

    def __init__(self, target: Target) -> None:
        self.target, mixture = target, target.mixture
        generator = torch.Generator().manual_seed(GRADING_SEED)
        self.x, self.t, _ = draw_pairs(mixture, N_VALIDATION // BATCH_SIZE, generator)
        self.velocity = mixture.velocity(self.x, self.t)  # (N_VALIDATION, d) float64
        shape = N_SAMPLES, mixture.dimensions
        self.noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.true = mixture.sample(N_SAMPLES, generator)
        directions = torch.randn(N_DIRECTIONS, shape[1], generator=generator, dtype=torch.float64)
        self.directions = nn.functional.normalize(directions)  # (N_DIRECTIONS, d)
        self.exact = integrate(mixture.velocity, self.noise)  # (N_SAMPLES, d)

    @torch.no_grad()
    def grade(self, field: Field) -> dict[str, float]:
        """Return the metrics of a field."""
        samples = integrate(field, self.noise)
        excess = field(self.x, self.t).double() - self.velocity
        metrics = {
            "excess": excess.square().sum(1).mean(),
            "paired": (samples - self.exact).square().sum(1).mean(),
            "sliced": self._sliced(samples),
        }
        if self.target.curve is not None:
            metrics["off_curve"] = torch.cdist(samples, self.target.curve).amin(1).square().mean()
        return {name: float(value) for name, value in metrics.items()}

    def _sliced(self, samples: Tensor) -> Tensor:
        """Return the mean squared 2-Wasserstein distance of the projections to true samples."""
        own, true = ((x @ self.directions.T).sort(0).values for x in (samples, self.true))
        return (own - true).square().mean()


def in_float32(network: nn.Module) -> Field:
    """Return a network of float32 inputs as a field of inputs of any precision."""
    forward: Callable[[Tensor, Tensor], Tensor] = network
    return lambda x, t: forward(x.float(), t.float())
