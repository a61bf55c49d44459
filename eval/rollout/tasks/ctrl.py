"""Imitate a controller that keeps an inverted pendulum upright, with tokens for angles and actions.

The pendulum has angle θ (rad) and velocity ω (rad/s) and is pushed at random. The controller sees
only the binned angle and must infer the velocity: the expert does so with a Kalman filter, a model
from its context. A document is angle, action, angle, action, ...; the angles are the environment's
answers.

    ω' = ω + dt (g/l sin θ + u) + push,   θ' = θ + dt ω'        push ~ N(0, noise²)
    u ~ N(clip(-(g/l + κ²) θ̂ - 2κ ω̂, ±U), 1), rounded to the nearest bin        the oracle

u (rad/s²) is the acceleration by the motor. (θ̂, ω̂) is the filter's estimate, which depends only on
the tokens, so a model can equal the oracle. With the true state and without noise and clipping, the
linearised closed loop in continuous time has both poles at -κ. If |θ| > θ_max, the pendulum falls:
the episode ends and the pendulum stays at ±θ_max.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from eval.rollout.environment import Environment
from eval.rollout.tasks.task import OracleTask

DT = 0.2  # s
GRAVITY = 9.81  # m/s²
THETA_MAX = 0.45  # rad
U_MAX = 10.0  # rad/s²
KAPPA = 2.0  # 1/s
ACTION_NOISE = 1.0  # rad/s², standard deviation of the expert's action
START = (0.1, 0.3)  # rad, rad/s: standard deviations of θ and ω before the first decision
LENGTHS = (0.9, 1.1)  # m, range of the pendulum's length over instances
NOISES = (0.18, 0.22)  # rad/s, range of the standard deviation of a push over instances
MAX_BINS = 1024


@dataclass(frozen=True)
class Bins:
    """n bins of equal width from -limit to limit. The outermost bins include all values beyond."""

    n: int
    limit: float

    @cached_property
    def edges(self) -> Tensor:  # (n - 1,) float64, edges between neighbouring bins
        return torch.linspace(-self.limit, self.limit, self.n + 1, dtype=torch.float64)[1:-1]

    @cached_property
    def centres(self) -> Tensor:  # (n,) float64
        half = self.limit / self.n
        return torch.linspace(half - self.limit, self.limit - half, self.n, dtype=torch.float64)

    def index(self, x: Tensor) -> Tensor:  # (B,) float64 -> (B,) int64
        return torch.bucketize(x, self.edges)

    def masses(self, mean: Tensor, std: float) -> Tensor:  # (B,) -> (B, n)
        """Compute the probability of every bin under N(mean, std²)."""
        below = torch.special.ndtr((self.edges - mean[:, None]) / std)  # (B, n - 1)
        zero = torch.zeros_like(mean)[:, None]
        return torch.cat([zero, below, zero + 1], dim=1).diff()


@dataclass(frozen=True)
class Plant:
    """The equations of one pendulum and of the expert that controls it."""

    stiffness: float  # g/l, 1/s²
    noise: float  # rad/s

    def expert(self, theta: Tensor, omega: Tensor) -> Tensor:  # (B,) each
        """Compute the mean of the expert's action for the state that it assumes."""
        u = -(self.stiffness + KAPPA**2) * theta - 2 * KAPPA * omega
        return u.clamp(-U_MAX, U_MAX)

    def advance(
        self, theta: Tensor, omega: Tensor, u: Tensor, push: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute θ and ω one time step later."""
        omega = omega + DT * (self.stiffness * theta.sin() + u) + push
        return theta + DT * omega, omega

    def gains(self, steps: int, width: float) -> Tensor:  # (steps, 2)
        """Compute the Kalman gains for successive readings of θ in bins of `width` rad.

        The plant is linearised at the upright position, and a reading's error has the variance of a
        uniform distribution over its bin, width²/12 (Kalman 1960, as in Anderson and Moore, Optimal
        Filtering, ch. 3).
        """
        A = torch.tensor([[1 + DT**2 * self.stiffness, DT], [DT * self.stiffness, 1]]).double()
        push = self.noise * torch.tensor([DT, 1.0]).double()
        P = torch.diag(torch.tensor(START).double() ** 2)  # covariance of (θ, ω)
        gains = []
        for _ in range(steps):
            gains.append(P[:, 0] / (P[0, 0] + width**2 / 12))
            P = P - torch.outer(gains[-1], P[0])
            P = A @ P @ A.T + torch.outer(push, push)
        return torch.stack(gains)


@dataclass(frozen=True, kw_only=True)
class Ctrl(OracleTask):
    """Keep a pendulum upright from binned angles. The instance determines its length and noise."""

    horizon: int = 32
    obs_bins: int = 33
    action_bins: int = 17

    name: ClassVar[str] = "ctrl"
    primary: ClassVar[str] = "failure"
    answer_tokens: ClassVar[int] = 1

    def claims(self) -> dict[str, bool]:
        counts = {key: getattr(self, key) for key in ("obs_bins", "action_bins")}
        return super().claims() | {
            f"{key}={n}: must be 2 to {MAX_BINS}": 2 <= n <= MAX_BINS for key, n in counts.items()
        }

    def symbols(self) -> list[str]:
        angles = [f"o{i}" for i in range(self.obs_bins)]
        return angles + [f"a{i}" for i in range(self.action_bins)]

    def unscored(self) -> list[int]:
        return list(range(self.obs_bins))

    @cached_property
    def plant(self) -> Plant:
        a, b = torch.rand(2, generator=self.generator("plant"), dtype=torch.float64).tolist()
        length = LENGTHS[0] + a * (LENGTHS[1] - LENGTHS[0])
        return Plant(GRAVITY / length, NOISES[0] + b * (NOISES[1] - NOISES[0]))

    def environment(self, n: int, seed: str | int) -> "CtrlEnvironment":
        generator = self.generator(seed, "pushes")
        z = torch.randn(2 + self.horizon, n, generator=generator, dtype=torch.float64)
        start = torch.tensor(START, dtype=torch.float64)[:, None] * z[:2]  # (2, B)
        angles, actions = Bins(self.obs_bins, THETA_MAX), Bins(self.action_bins, U_MAX)
        return CtrlEnvironment(self.plant, angles, actions, start, self.plant.noise * z[2:])


class CtrlEnvironment(Environment):
    """n pendulums. A token that is not an action counts as illegal and acts like u = 0."""

    can_end = True

    def __init__(
        self, plant: Plant, angles: Bins, actions: Bins, start: Tensor, pushes: Tensor
    ) -> None:
        self.plant, self.angles, self.actions = plant, angles, actions
        theta, self.omega = start  # (B,) each
        self.theta = theta.clamp(-THETA_MAX, THETA_MAX)
        self.pushes = pushes  # (H, B)
        self.fallen = torch.zeros_like(theta, dtype=torch.bool)
        self.gains = plant.gains(len(pushes) + 1, 2 * angles.limit / angles.n)
        self.estimate = torch.zeros(2, len(theta), dtype=torch.float64)  # of θ and ω
        self.steps = 0
        self.prompts = self._read()
        sums = torch.zeros(4, len(theta), dtype=torch.float64)
        self.decisions, self.illegal, self.action_error, self.cost = sums

    def oracle(self) -> Tensor:
        mean = self.plant.expert(*self.estimate)
        p = self.actions.masses(mean, ACTION_NOISE)  # (B, A)
        return pad(p, (self.angles.n, 1))

    def step(self, tokens: Tensor) -> Tensor:
        action = tokens - self.angles.n
        legal = (action >= 0) & (action < self.actions.n)
        u = torch.where(legal, self.actions.centres[action.clamp(0, self.actions.n - 1)], 0.0)
        self._count(u, legal)
        push = self.pushes[self.steps]
        theta, omega = self.plant.advance(self.theta, self.omega, u, push)
        self.theta = torch.where(self.fallen, self.theta, theta)
        self.fallen = self.fallen | (self.theta.abs() > THETA_MAX)
        self.theta = self.theta.clamp(-THETA_MAX, THETA_MAX)
        self.omega = omega.masked_fill(self.fallen, 0.0)
        self.steps += 1
        still = torch.zeros_like(push)
        self.estimate = torch.stack(self.plant.advance(*self.estimate, u, still))
        return self._read()

    def _read(self) -> Tensor:  # (B, 1) int64
        """Return the token of the angle and correct the expert's estimate with it."""
        token = self.angles.index(self.theta)
        surprise = self.angles.centres[token] - self.estimate[0]
        self.estimate = self.estimate + self.gains[self.steps][:, None] * surprise
        return token[:, None]

    def has_ended(self) -> Tensor:
        return self.fallen

    def outcomes(self) -> dict[str, Tensor]:
        """Return four scores per episode.

        failure        1 if the pendulum fell, else 0
        cost           mean of θ² + 0.1 ω² + 0.001 u² over all steps (rad, rad/s, rad/s²; as in
                       Gymnasium's Pendulum), where steps after a fall count θ_max²
        action_error   mean squared distance from the expert's mean action (rad²/s⁴), before a fall
        illegal_share  share of tokens that are not actions, before a fall
        """
        return {
            "failure": self.fallen.double(),
            "cost": self.cost / self.steps,
            "action_error": self.action_error / self.decisions,
            "illegal_share": self.illegal / self.decisions,
        }

    def _count(self, u: Tensor, legal: Tensor) -> None:
        """Add the current decisions, u and legal (B,), to the sums that `outcomes` needs."""
        u = u.masked_fill(self.fallen, 0.0)
        alive = ~self.fallen
        self.decisions += alive
        self.illegal += alive & ~legal
        self.action_error += alive * (u - self.plant.expert(*self.estimate)) ** 2
        self.cost += self.theta**2 + 0.1 * self.omega**2 + 0.001 * u**2
