"""A linear system whose demonstrations hide what keeps it stable; every rollout in closed form.

    s' = A s + B a + w,  w ~ N(0, W)      the expert acts a = K* s, a policy a = K s

A is symmetric. Its two unstable modes are the least excited ones; K* = stabiliser + distractor. The
stabiliser moves the unstable modes; the distractor answers the two most excited modes with actions
that change neither, and is nearly all that a validation loss sees. Demonstrations are states of the
expert's stationary law N(0, Σ), Σ = (A + B K*) Σ (A + B K*)ᵀ + W.

Policy and expert start from the same such state and meet the same noise. With e = s - s* and
z = (e, s*):

    z' = M z + (0, w),    M = ( A + B K    B (K - K*) )      so Cov z' = M Cov z Mᵀ + diag(0, W)
                              (    0        A + B K*  )

which is exact, and exactly zero in e for K = K*. A policy that diverges has errors up to inf.
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
N_DISTRACTING = 2  # modes that the distractor reads
UNSTABLE, STABILISED = 1.1, 0.5  # eigenvalues of the unstable modes, without and with the expert
STABLE = (0.0, 0.9)  # eigenvalues of the other modes, evenly spaced, larger where more excited
DISTRACTION = 0.5  # spectral norm of the distractor


@dataclass(frozen=True)
class Rollouts:
    """Expectations for each decision of an episode, before it (states s) or after it (s')."""

    deviation: Array  # (H,) E‖s' - s*'‖²
    action_error: Array  # (H,) E‖(K - K*) s‖²
    cost: Array  # (H,) E‖s'‖² + E‖K s‖²


@dataclass(frozen=True, kw_only=True)
class Lds(TaskBase):
    """The plant and its expert, drawn from the instance. Raises ValueError on impossible sizes."""

    instance: int = 0
    horizon: int = 100  # decisions in an episode
    states: int = 20  # n
    actions: int = 6  # m
    width: int = 16  # of the policies that imitate the expert
    excitation: float = 1e-4  # least variance of w along a mode; the largest is 1

    name: ClassVar[str] = "lds"
    primary: ClassVar[str] = "log10_deviation"

    def __post_init__(self) -> None:
        special = N_UNSTABLE + N_DISTRACTING
        least = {"instance": 0, "horizon": 1, "states": special + 1, "width": special}
        least["actions"] = special + N_DISTRACTING  # room for actions that change no special mode
        problems = [
            f"{key}={getattr(self, key)}: must be at least {low}"
            for key, low in least.items()
            if getattr(self, key) < low
        ]
        if not 0 < self.excitation <= 1:
            problems.append(f"excitation={self.excitation}: must be in (0, 1]")
        if problems:
            raise ValueError(f"task lds: {'; '.join(problems)}")

    @cached_property
    def modes(self) -> Array:  # (n, n)
        """Eigenvectors of A as columns, the least excited first."""
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
        """Variances of the modes are evenly spaced in the logarithm, from `excitation` to 1."""
        return self.modes * np.geomspace(self.excitation, 1.0, self.states) @ self.modes.T

    @cached_property
    def stabiliser(self) -> Array:  # (m, n)
        unstable = self.modes[:, :N_UNSTABLE].T
        return (STABILISED - UNSTABLE) * np.linalg.pinv(unstable @ self.B) @ unstable

    @cached_property
    def distractor(self) -> Array:  # (m, n)
        excited = self.modes[:, -N_DISTRACTING:].T
        special = np.concatenate([self.modes[:, :N_UNSTABLE].T, excited])
        harmless = null_space(special @ self.B)  # (m, k): actions that change no special mode
        random = np.random.default_rng([self.instance, 2])
        turn = np.linalg.qr(random.standard_normal((harmless.shape[1], N_DISTRACTING))).Q
        return DISTRACTION * harmless @ turn @ excited

    @cached_property
    def expert(self) -> Array:  # (m, n)
        """K*."""
        return self.stabiliser + self.distractor

    @cached_property
    def sigma(self) -> Array:  # (n, n)
        """Σ, the covariance of the states that demonstrations show."""
        return solve_discrete_lyapunov(self.A + self.B @ self.expert, self.W)

    def val_loss(self, K: Array) -> float:
        """E‖(K - K*) s‖² = tr((K - K*) Σ (K - K*)ᵀ) on the expert's states; inf if K is not finite.

        Errors in the unstable modes are nearly invisible in it.
        """
        return float(_second_moment(K - self.expert, self.sigma))

    def rollouts(self, K: Array) -> Rollouts:
        """What a policy K (m, n) does in closed loop, exactly; inf beyond the range of float64."""
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
        """Of (s - s*, s*)."""
        own, experts = self.A + self.B @ K, self.A + self.B @ self.expert
        zero = np.zeros_like(own)
        M = np.block([[own, self.B @ (K - self.expert)], [zero, experts]])
        P = np.block([[zero, zero], [zero, self.sigma]])
        noise = np.block([[zero, zero], [zero, self.W]])
        yield P
        for _ in range(self.horizon):
            P = M @ P @ M.T + noise
            yield P


def _second_moment(T: Array, covariance: Array) -> Array:  # (k, d), (..., d, d) -> (...)
    """E‖T x‖² of a centred x; inf where an overflow ended as inf - inf."""
    moment = (T @ covariance * T).sum((-2, -1))
    return np.where(np.isnan(moment), np.inf, moment)


def grade_policy(lds: Lds, K: Array) -> Grade:
    """How the policy K (m, n) does in closed loop. Exact, so that intervals have no width.

    val_loss       E‖(K - K*) s‖² on the expert's states
    deviation      E‖s - s*‖² / E‖s*‖² over the horizon, same start, same noise; 1 is 100 %
    cost_ratio     E‖s‖² + E‖K s‖² over the expert's; below 1 is possible, so nothing ranks by it
    A, B, G, gap   as in eval/rollout/metrics.py, of the squared action error

    A policy that diverges has large numbers, up to inf, and nothing is cut off.
    """
    own, experts = lds.rollouts(K), lds.rollouts(lds.expert)
    steps = np.arange(1, lds.horizon + 1)  # l
    val_loss = lds.val_loss(K)
    A, B = val_loss * steps, own.action_error.cumsum()
    gap = (B - A) / steps if np.isfinite(val_loss) else np.full_like(B, np.inf)
    deviation = own.deviation.mean() / np.trace(lds.sigma)
    with np.errstate(divide="ignore"):  # the expert itself has none
        log10_deviation = np.log10(deviation)
    curves = {"A": A, "B": B, "G": gap}
    values = {
        "val_loss": val_loss,
        "deviation": deviation,
        "log10_deviation": log10_deviation,
        "cost_ratio": own.cost.mean() / experts.cost.mean(),
        "gap": gap[-1],
    }
    return Grade(
        metrics={name: Estimate(*[float(each)] * 3, n=1) for name, each in values.items()},
        curves={name: Curve(*[each.tolist()] * 3) for name, each in curves.items()},
    )
