"""Define mixtures of Gaussians, and the exact velocity field that flow matching learns.

On the linear path x_t = (1 - t) x_0 + t x_1 with x_0 ~ N(0, I), component k of the data N(μ, Σ)
gives x_t ~ N(t μ, S) with S = (1 - t)² I + t² Σ, and

    E[x_1 - x_0 | x_t, k] = μ + (t Σ - (1 - t) I) S⁻¹ (x_t - t μ).

The velocity is the mean of these over the posterior of k. All numbers are float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHT_TOLERANCE = 1e-9  # of the sum of the weights


@dataclass(frozen=True)
class Mixture:
    """A mixture of K Gaussians in d dimensions with covariances U diag(variances) Uᵀ."""

    weights: Tensor  # (K,), sum to 1
    means: Tensor  # (K, d)
    axes: Tensor  # (K, d, d), the orthogonal U, one axis per column
    variances: Tensor  # (K, d), all positive

    def __post_init__(self) -> None:
        n, d = self.means.shape
        shapes = {"weights": (n,), "axes": (n, d, d), "variances": (n, d)}
        problems = [
            f"{name} is {tuple(getattr(self, name).shape)}, but must be {shape}"
            for name, shape in shapes.items()
            if tuple(getattr(self, name).shape) != shape
        ]
        if not bool((self.variances > 0).all()):
            problems.append("variances must be positive")
        if abs(float(self.weights.sum()) - 1) > WEIGHT_TOLERANCE or bool((self.weights < 0).any()):
            problems.append("weights must not be negative, and must sum to 1")
        if problems:
            raise ValueError(f"mixture: {'; '.join(problems)}")

    @classmethod
    def of(cls, means: Tensor, covariances: Tensor) -> "Mixture":
        """Return a mixture with equal weights from means (K, d) and covariances (K, d, d)."""
        variances, axes = torch.linalg.eigh(covariances)
        weights = torch.full((len(means),), 1 / len(means), dtype=means.dtype)
        return cls(weights, means, axes, variances)

    @property
    def dimensions(self) -> int:
        return self.means.shape[1]

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n points (n, d)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.dimensions, generator=generator, dtype=torch.float64)
        roots = self.axes * self.variances.sqrt()[:, None, :]  # (K, d, d)
        x = torch.empty_like(z)
        for component, (mean, root) in enumerate(zip(self.means, roots, strict=True)):
            chosen = k == component
            x[chosen] = mean + z[chosen] @ root.T
        return x

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Return E[x_1 - x_0 | x_t = x] (n, d) at points x (n, d) and times t (n,) in [0, 1]."""
        if not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError("velocity: every time must be in [0, 1]")
        x, t = x.double(), t.double()[:, None, None]  # (n, d), (n, 1, 1)
        z = torch.einsum("nkd,kde->nke", x[:, None] - t * self.means, self.axes)  # (n, K, d)
        S = (1 - t) ** 2 + t**2 * self.variances  # (n, K, d), its eigenvalues
        log_density = -0.5 * (z.square() / S + S.log()).sum(2)  # (n, K), up to a constant
        posterior = (self.weights.log() + log_density).softmax(1)  # (n, K)
        gain = (t * self.variances - (1 - t)) / S  # (n, K, d)
        turned = torch.einsum("nke,kde->nkd", gain * z, self.axes)
        return (posterior[:, :, None] * (self.means + turned)).sum(1)
