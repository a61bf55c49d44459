"""Behaviour cloning in a linear dynamical system, where every metric has a closed form.

    s' = A s + B a + w,  w ~ N(0, W)      the expert acts a = K* s, a policy a = K s

The demonstrations hardly show what keeps the system stable. A is symmetric, and its two unstable
modes are the least excited ones. The expert is K* = stabiliser + distractor. The stabiliser acts on
the unstable modes. The distractor responds to the two most excited modes with actions that change
neither of them, and it accounts for nearly all of the validation loss. Demonstrations show states
from the expert's stationary distribution N(0, Σ) with Σ = (A + B K*) Σ (A + B K*)ᵀ + W.

In a rollout, policy and expert start from the same such state s and receive the same noise. Let
s* be the expert's state, e = s - s* and z = (e, s*). Then

    z' = M z + (0, w),    M = ( A + B K    B (K - K*) )      so Cov z' = M Cov z Mᵀ + diag(0, W)
                              (    0        A + B K*  )

This recursion is exact, and e is exactly zero for K = K*. Policies are matrices, so this task has
no dataset and no language model; studies/sweep/lds.py trains the policies.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from scipy.linalg import null_space, solve_discrete_lyapunov

from eval.rollout.intervals import Estimate
from eval.rollout.metrics import Curve, Grade
from eval.rollout.tasks.task import TaskBase

Array = np.ndarray  # float64

N_UNSTABLE = 2
N_DISTRACTING = 2  # number of modes that the distractor responds to
UNSTABLE, STABILISED = 1.1, 0.5  # eigenvalues of the unstable modes without and with the expert
STABLE = (0.0, 0.9)  # range of the other eigenvalues, evenly spaced, increasing with excitation
DISTRACTION = 0.5  # spectral norm of the distractor


@dataclass(frozen=True)
class Rollouts:
    """Expectations at each of H decisions; s is the state before the decision, s' after it."""

    deviation: Array  # (H,) E‖s' - s*'‖²
    action_error: Array  # (H,) E‖(K - K*) s‖²
    cost: Array  # (H,) E‖s'‖² + E‖K s‖²


@dataclass(frozen=True, kw_only=True)
class Lds(TaskBase):
    """The linear system and its expert. `instance` selects the random matrices."""

    instance: int = 0
    horizon: int = 100  # decisions per episode
    states: int = 20  # n, dimension of s
    actions: int = 6  # m, dimension of a
    width: int = 16  # hidden width of the policies that imitate the expert
    excitation: float = 1e-4  # smallest variance of w along a mode; the largest is 1

    name: ClassVar[str] = "lds"
    primary: ClassVar[str] = "log10_deviation"
    references: ClassVar[tuple[str, ...]] = ("zero",)

    def claims(self) -> dict[str, bool]:
        special = N_UNSTABLE + N_DISTRACTING
        sizes = {"instance": 0, "horizon": 1, "states": special + 1, "width": special}
        sizes["actions"] = special + N_DISTRACTING  # the distractor needs N_DISTRACTING free ones
        in_range = 0 < self.excitation <= 1
        return self.at_least(**sizes) | {
            f"excitation={self.excitation}: must be in (0, 1]": in_range
        }

    @cached_property
    def modes(self) -> Array:  # (n, n)
        """The eigenvectors of A as columns, in increasing order of excitation."""
        random = np.random.default_rng([self.instance, 0])
        return np.linalg.qr(random.standard_normal((self.states, self.states))).Q

    @cached_property
    def A(self) -> Array:  # (n, n)
        stable = np.linspace(*STABLE, self.states - N_UNSTABLE)
        return self.modes * np.array([UNSTABLE] * N_UNSTABLE + [*stable]) @ self.modes.T

    @cached_property
    def B(self) -> Array:  # (n, m)
        random = np.random.default_rng([self.instance, 1])
        return random.standard_normal((self.states, self.actions)) / np.sqrt(self.states)

    @cached_property
    def W(self) -> Array:  # (n, n)
        """The covariance of the noise, with variances from `excitation` to 1 along the modes.

        Their logarithms are evenly spaced.
        """
        return self.modes * np.geomspace(self.excitation, 1.0, self.states) @ self.modes.T

    @cached_property
    def stabiliser(self) -> Array:  # (m, n)
        """The part of K* that moves the unstable eigenvalues to STABILISED."""
        unstable = self.modes[:, :N_UNSTABLE].T
        return (STABILISED - UNSTABLE) * np.linalg.pinv(unstable @ self.B) @ unstable

    @cached_property
    def distractor(self) -> Array:  # (m, n)
        """The part of K* that responds to the most excited modes without changing them."""
        excited = self.modes[:, -N_DISTRACTING:].T
        special = np.concatenate([self.modes[:, :N_UNSTABLE].T, excited])
        harmless = null_space(special @ self.B)  # (m, k), actions that change no special mode
        random = np.random.default_rng([self.instance, 2])
        turn = np.linalg.qr(random.standard_normal((harmless.shape[1], N_DISTRACTING))).Q
        return DISTRACTION * harmless @ turn @ excited

    @cached_property
    def expert(self) -> Array:  # (m, n)
        """The expert's policy K*."""
        return self.stabiliser + self.distractor

    @cached_property
    def sigma(self) -> Array:  # (n, n)
        """The covariance Σ of the states in the demonstrations."""
        return solve_discrete_lyapunov(self.A + self.B @ self.expert, self.W)

    def val_loss(self, K: Array) -> float:
        """Compute E‖(K - K*) s‖² = tr((K - K*) Σ (K - K*)ᵀ) on the expert's states.

        It is inf if K is not finite. Errors in the unstable modes hardly change it.
        """
        return float(_second_moment(K - self.expert, self.sigma))

    def grade_reference(self, name: str, *, n: int, seed: int) -> Grade:
        """Grade "zero", the policy that never acts. The grade is exact for any n and seed."""
        return grade_policy(self, {"zero": np.zeros_like(self.expert)}[name])

    def rollouts(self, K: Array) -> Rollouts:
        """Compute the closed-loop expectations of a policy K (m, n) exactly.

        Values beyond the range of float64 are inf.
        """
        identity = np.eye(self.states)
        error = np.concatenate([identity, np.zeros_like(identity)], axis=1)  # e = error z
        own = np.concatenate([identity, identity], axis=1)  # s = own z
        with np.errstate(over="ignore", invalid="ignore"):
            P = np.stack(list(self._covariances(K)))  # (H + 1, 2n, 2n)
            before, after = P[:-1], P[1:]
            return Rollouts(
                deviation=_second_moment(error, after),
                action_error=_second_moment((K - self.expert) @ own, before),
                cost=_second_moment(own, after) + _second_moment(K @ own, before),
            )

    def _covariances(self, K: Array) -> Iterator[Array]:  # (2n, 2n), 1 + horizon times
        """Yield the covariance of z = (s - s*, s*) before each decision and after the last."""
        policy_loop, expert_loop = self.A + self.B @ K, self.A + self.B @ self.expert
        zero = np.zeros_like(policy_loop)
        M = np.block([[policy_loop, self.B @ (K - self.expert)], [zero, expert_loop]])
        P = np.block([[zero, zero], [zero, self.sigma]])
        noise = np.block([[zero, zero], [zero, self.W]])
        yield P
        for _ in range(self.horizon):
            P = M @ P @ M.T + noise
            yield P


def _second_moment(T: Array, covariance: Array) -> Array:  # (k, d), (..., d, d) -> (...)
    """Compute E‖T x‖² for x with mean 0. An overflow to inf - inf gives inf instead of NaN."""
    moment = (T @ covariance * T).sum((-2, -1))
    return np.where(np.isnan(moment), np.inf, moment)


def grade_policy(lds: Lds, K: Array) -> Grade:
    """Grade the policy K (m, n) in closed loop.

    The metrics are exact, so their intervals have zero width.

    val_loss         E‖(K - K*) s‖² on the expert's states
    deviation        E‖s - s*‖² / E‖s*‖² over the horizon, with the same start and noise; 1 is 100 %
    log10_deviation  its logarithm, by which policies are ranked
    cost_ratio       E‖s‖² + E‖K s‖² over that of the expert. It can be below 1 and ranks nothing.
    A, B, G, gap     as in eval/rollout/metrics.py, with the squared action error in place of the KL

    The values for a diverging policy are not clipped; they can be inf.
    """
    own, expert = lds.rollouts(K), lds.rollouts(lds.expert)
    steps = np.arange(1, lds.horizon + 1)  # l
    val_loss = lds.val_loss(K)
    A, B = val_loss * steps, own.action_error.cumsum()
    gap = (B - A) / steps if np.isfinite(val_loss) else np.full_like(B, np.inf)
    deviation = own.deviation.mean() / np.trace(lds.sigma)
    with np.errstate(divide="ignore"):  # the expert's own deviation is 0
        log10_deviation = np.log10(deviation)
    curves = {"A": A, "B": B, "G": gap}
    values = {
        "val_loss": val_loss,
        "deviation": deviation,
        "log10_deviation": log10_deviation,
        "cost_ratio": own.cost.mean() / expert.cost.mean(),
        "gap": gap[-1],
    }
    return Grade(
        metrics={name: Estimate(*[float(each)] * 3, n=1) for name, each in values.items()},
        curves={name: Curve(*[each.tolist()] * 3) for name, each in curves.items()},
    )
