"""Define a linear task with known features, and the distance of a row space from them.

    y = F* G* x + ε,   x ~ N(0, Σ),   G* (k, d) with orthonormal rows,   F* (m, k)

A model F G is trained on the squared error. Let N = I - G*ᵀ G* project onto what the task ignores.
The rows of G span the features if and only if G N = 0. With E = F G - F* G*, the gradient of the
expected loss is Fᵀ E Σ for G. One step at the rate η changes the part of G outside the features to

    SGD               G₊ N = G N - η Fᵀ F (G N) Σ N - η Fᵀ (F G G*ᵀ - F*) G* Σ N
    DoPr-SGD, γ → 0   G₊ N = (I - η Fᵀ F) G N

because M = Fᵀ E Σ Σ⁻¹ = Fᵀ E and F* G* N = 0. So DoPr-SGD contracts that part by a factor without Σ
and F*. SGD contracts a direction by its variance, and its last term creates an error where there is
none: if G N = 0, it vanishes for all F only if G* Σ N = 0.

The sine of an angle between the row spaces also depends on G G*ᵀ, by which G N is to be divided. If
F fits what G has of the features, F G G*ᵀ = F*, then G₊ G*ᵀ = G G*ᵀ under DoPr-SGD, so the tangents
T = (G G*ᵀ)⁻¹ G N contract linearly, too: T₊ = (I - η (G G*ᵀ)⁻¹ Fᵀ F G G*ᵀ) T.

Muon keeps the row space of M, so G N = 0 stays with DoPr-Muon. AdamW divides each entry of M by
another number, which does not keep its row space.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

INPUTS, OUTPUTS, FEATURES = 32, 16, 4  # d, m, k


@dataclass(frozen=True)
class Task:
    """The true weights, the covariance of the inputs and the noise."""

    F: Tensor  # (m, k), orthonormal columns
    G: Tensor  # (k, d), orthonormal rows
    root: Tensor  # (d, d), the symmetric square root of Σ
    noise: float  # standard deviation of each entry of ε

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return n inputs (n, d) and their noisy outputs (n, m)."""
        x = torch.randn(n, len(self.root), generator=generator, dtype=torch.float64) @ self.root
        noise = torch.randn(n, len(self.F), generator=generator, dtype=torch.float64)
        return x, x @ (self.F @ self.G).mT + self.noise * noise

    def loss(self, F: Tensor, G: Tensor) -> float:
        """Return the expected loss of the model F G on new inputs, less that of the true model."""
        return float(((F @ G - self.F @ self.G) @ self.root).square().sum() / 2)


def make_task(condition: float, noise: float, seed: int) -> Task:
    """Draw a task.

    Args:
        condition: the condition number of Σ. Its eigenvalues are a power law with the mean 1, and
            its eigenvectors are random.
        noise: the standard deviation of the noise of an output. The signal's is about √(k/m).
    """
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(rows: int, columns: int) -> Tensor:  # (rows, columns), orthonormal columns
        gaussian = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(gaussian)[0]

    ranks = torch.arange(1, INPUTS + 1, dtype=torch.float64)
    eigenvalues = condition ** -(ranks.log() / ranks[-1].log())
    V = orthonormal(INPUTS, INPUTS)
    root = V * (eigenvalues / eigenvalues.mean()).sqrt() @ V.mT
    return Task(orthonormal(OUTPUTS, FEATURES), orthonormal(INPUTS, FEATURES).mT, root, noise)


def distance(G: Tensor, features: Tensor) -> float:
    """Return the sine of the largest principal angle between the row spaces of G and `features`.

    Args:
        G: (k, d).
        features: (k, d), orthonormal rows.
    """
    Q = torch.linalg.qr(G.mT)[0]  # (d, k)
    return float(torch.linalg.matrix_norm(features - features @ Q @ Q.mT, 2))
