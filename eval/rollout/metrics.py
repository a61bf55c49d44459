"""From episodes to numbers: what a rollout costs beyond what validation sees.

    A(l) = Σ_{t<=l} E q_t   on the data's contexts, q_t = KL(oracle ‖ model) in nats
    B(l) = Σ_{t<=l} E q_t   on the model's own rollouts
    G(l) = (B(l) - A(l)) / l      the test-time feedback gap
    %ExAccErr(l) = 100 (B(l) - A(l)) / A(l)      (Arora et al. 2022); never rank by it: what
                                  divides is the teacher-forced loss, which optimizers change
    C(l) = Σ_{t<=l} E r_t   on the model's own rollouts, r_t = KL(model ‖ oracle)

By the chain rule A(l) is KL(source ‖ model) and C(l) is KL(model ‖ source) between the laws of
whole sequences of l decisions: what the model leaves out, and what it makes up. A alone rewards
diffuse models, and so does B, which mixes both sides; C alone rewards sharp ones, down to a parrot
of one likely sequence. Their sum, Jeffreys' divergence, is zero for the source only and infinite
for the parrot. E is over all episodes: one that has ended adds nothing. B and G would then reward
ending early: where episodes end there are none, but S(l), the share under way after l decisions.

Every number comes with a 95 % bootstrap interval over episodes, both rollouts resampled together.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from eval.rollout.environment import Rollout
from eval.rollout.intervals import Estimate, bootstrap_weights, percentiles


@dataclass(frozen=True)
class Curve:
    """A number for each step of the horizon, with its interval."""

    mean: list[float]  # (H,)
    lo: list[float]
    hi: list[float]


@dataclass(frozen=True)
class Grade:
    """What grading one model says."""

    metrics: dict[str, Estimate]
    curves: dict[str, Curve] = field(default_factory=dict)
    n_t: dict[str, list[int]] = field(default_factory=dict)  # episodes that reached each step
    samples: list[dict[str, Any]] = field(default_factory=list)  # {"data": ids, "own": ids}

    def means(self) -> dict[str, float]:
        """The metrics without their intervals."""
        return {name: each.mean for name, each in self.metrics.items()}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def oracle_grade(data: Rollout, own: Rollout, n_samples: int = 4) -> Grade:
    """Compare episodes that the oracle decided with episodes that the model decided."""
    weights = bootstrap_weights(len(own.tokens))  # (R, B)
    curves = {"A": _per_episode(weights, data.error).cumsum(1)}  # (R, H)
    if own.alive is not None and data.alive is not None:
        curves["survival"] = _share(weights, own.alive)
        curves["data_survival"] = _share(weights, data.alive)
    else:
        curves["B"] = _per_episode(weights, own.error).cumsum(1)
        with np.errstate(invalid="ignore"):  # both are infinite where the model rules tokens out
            curves["G"] = (curves["B"] - curves["A"]) / np.arange(1, own.tokens.shape[1] + 1)
    if not own.reverse.isinf().any():  # the oracle gives mass to all that the model does
        curves["C"] = _per_episode(weights, own.reverse).cumsum(1)
    values = {
        "val_ce": _mean(weights, data.nll),
        "val_kl": _mean(weights, data.error),
        "overconfidence": _mean(weights, data.nll) - _mean(weights, data.entropy),
        **_of_sequences({name: each[:, -1] for name, each in curves.items()}),
        **({} if own.alive is not None else _drift(weights, data, own)),
        **{name: _mean(weights, each[:, None]) for name, each in own.outcomes.items()},
        **{f"data_{name}": _mean(weights, each[:, None]) for name, each in data.outcomes.items()},
    }
    rows = zip(data.tokens[:n_samples].tolist(), own.tokens[:n_samples].tolist(), strict=True)
    return Grade(
        metrics={name: estimate(each, len(own.tokens)) for name, each in values.items()},
        curves={name: curve(each) for name, each in curves.items()},
        n_t={"data": _alive(data.error), "own": _alive(own.error)},
        samples=[{"data": reference, "own": ids} for reference, ids in rows],
    )


def _of_sequences(last: dict[str, np.ndarray]) -> dict[str, np.ndarray]:  # (R,) each
    """What the ends of the curves say of whole episodes."""
    found = {}
    if "C" in last:
        found = {"sequence_kl": last["C"], "jeffreys": last["A"] + last["C"]}
    if "B" in last:
        with np.errstate(divide="ignore", invalid="ignore"):  # a model without error on the data
            excess = 100 * (last["B"] - last["A"]) / last["A"]
        found |= {"accumulated_kl": last["B"], "gap": last["G"], "excess_percent": excess}
    return found


def _drift(weights: np.ndarray, data: Rollout, own: Rollout) -> dict[str, np.ndarray]:
    """None where episodes end: late steps would be those of the stragglers."""
    return {"entropy_drift": entropy_drift(weights, data.nll, own.entropy)}


def entropy_drift(weights: np.ndarray, nll: Tensor, own_entropy: Tensor) -> np.ndarray:  # (R,)
    """Mean entropy of own rollouts minus cross-entropy on the data, nats, both in the last half.

    Zero for a calibrated model that does not drift (Braverman et al. 2020, entropy-rate drift).
    """
    late = slice(own_entropy.shape[1] // 2, None)
    return _mean(weights, own_entropy[:, late]) - _mean(weights, nll[:, late])


def estimate(values: np.ndarray, n: int) -> Estimate:
    """From one value per row of the bootstrap weights; n units were resampled."""
    mean, lo, hi = percentiles(values)
    return Estimate(float(mean), float(lo), float(hi), n)


def curve(values: np.ndarray) -> Curve:  # (R, H)
    mean, lo, hi = percentiles(values)
    return Curve(mean.tolist(), lo.tolist(), hi.tolist())


def _sums(weights: np.ndarray, values: Tensor) -> tuple[np.ndarray, np.ndarray]:  # (R, H) twice
    """Weighted sum, and weight, of what is not NaN in each column of (B, H)."""
    array = values.double().cpu().numpy()
    total = weights @ np.where(np.isfinite(array), array, 0.0)
    total[weights @ np.isinf(array) > 0] = np.inf  # 0 times inf is not to be NaN
    return total, weights @ ~np.isnan(array)


def _per_episode(weights: np.ndarray, values: Tensor) -> np.ndarray:  # (R, H)
    """Mean over all episodes at each step; those that have ended count as 0."""
    total, _ = _sums(weights, values)
    return total / weights.sum(1, keepdims=True)


def _mean(weights: np.ndarray, values: Tensor) -> np.ndarray:  # (R,)
    """Mean over all graded decisions; NaN if there are none."""
    total, count = _sums(weights, values)
    with np.errstate(invalid="ignore"):
        return total.sum(1) / count.sum(1)


def _share(weights: np.ndarray, alive: Tensor) -> np.ndarray:  # (R, H)
    """The share of episodes that are under way after each decision."""
    return weights @ alive.double().numpy() / weights.sum(1, keepdims=True)


def _alive(values: Tensor) -> list[int]:
    return (~values.isnan()).sum(0).tolist()
