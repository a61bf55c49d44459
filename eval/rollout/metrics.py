"""Compute the metrics of the rollout benchmark from episodes.

With q_t = KL(oracle ‖ model) and r_t = KL(model ‖ oracle) before decision t, in nats:

    A(l) = Σ_{t<=l} E q_t                    on the data's contexts
    B(l) = Σ_{t<=l} E q_t                    on the model's own rollouts
    C(l) = Σ_{t<=l} E r_t                    on the model's own rollouts
    G(l) = (B(l) - A(l)) / l                 the test-time feedback gap
    %ExAccErr(l) = 100 (B(l) - A(l)) / A(l)  (Arora et al. 2022). Do not rank models by it: it
                                             divides by the teacher-forced loss A.

By the chain rule A(l) is KL(source ‖ model) and C(l) is KL(model ‖ source) between the
distributions of sequences of l decisions. A measures what the model misses and C what it invents.
A alone favours diffuse models, and so does B, which mixes both distributions. C alone favours sharp
models, such as one that always repeats the same likely sequence. Their sum A + C, Jeffreys'
divergence, is zero only for the source and infinite for that repeating model.

E is the mean over all episodes, where an ended episode contributes 0. B and G would therefore
reward early ends. For environments in which episodes can end they are replaced by S(l), the share
of episodes that still run after l decisions.

Every number has a 95 % bootstrap interval over episodes. Both rollouts are resampled together.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from eval.rollout.environment import Rollout
from eval.rollout.intervals import Estimate, bootstrap_weights, percentiles

N_SAMPLES = 4  # the number of episodes whose tokens are kept as samples


@dataclass(frozen=True)
class Curve:
    """A value for each step of the horizon, with its interval."""

    mean: list[float]  # (H,)
    lo: list[float]
    hi: list[float]


@dataclass(frozen=True)
class Grade:
    """The results of grading one model."""

    metrics: dict[str, Estimate]
    curves: dict[str, Curve] = field(default_factory=dict)
    n_t: dict[str, list[int]] = field(default_factory=dict)  # episodes graded at each step
    samples: list[dict[str, Any]] = field(default_factory=list)  # {"data": ids, "own": ids}

    def means(self) -> dict[str, float]:
        """Return the metrics without their intervals."""
        return {name: each.mean for name, each in self.metrics.items()}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def oracle_grade(data: Rollout, own: Rollout) -> Grade:
    """Compare episodes decided by the oracle (`data`) with those decided by the model (`own`)."""
    weights = bootstrap_weights(len(own.tokens))  # (R, B)
    curves = {"A": _mean_over_episodes(weights, data.error).cumsum(1)}  # (R, H)
    if own.alive is not None and data.alive is not None:
        curves["survival"] = _share_alive(weights, own.alive)
        curves["data_survival"] = _share_alive(weights, data.alive)
    else:
        curves["B"] = _mean_over_episodes(weights, own.error).cumsum(1)
        with np.errstate(invalid="ignore"):  # inf - inf, where the model excludes a possible token
            curves["G"] = (curves["B"] - curves["A"]) / np.arange(1, own.tokens.shape[1] + 1)
    if not own.reverse.isinf().any():  # the oracle excludes no token that the model allows
        curves["C"] = _mean_over_episodes(weights, own.reverse).cumsum(1)
    val_ce = _mean_over_decisions(weights, data.nll)
    values = {
        "val_ce": val_ce,
        "val_kl": _mean_over_decisions(weights, data.error),
        "overconfidence": val_ce - _mean_over_decisions(weights, data.entropy),
        **_sequence_metrics({name: each[:, -1] for name, each in curves.items()}),
    }
    if own.alive is None:  # else the last half would describe only the episodes that last long
        values["entropy_drift"] = entropy_drift(weights, data.nll, own.entropy)
    values |= _outcome_means(weights, own.outcomes, "")
    values |= _outcome_means(weights, data.outcomes, "data_")
    rows = zip(data.tokens[:N_SAMPLES].tolist(), own.tokens[:N_SAMPLES].tolist(), strict=True)
    return Grade(
        metrics={name: estimate(each, len(own.tokens)) for name, each in values.items()},
        curves={name: curve(each) for name, each in curves.items()},
        n_t={"data": _count_graded(data.error), "own": _count_graded(own.error)},
        samples=[{"data": reference, "own": ids} for reference, ids in rows],
    )


def _sequence_metrics(last: dict[str, np.ndarray]) -> dict[str, np.ndarray]:  # (R,) each
    """Compute the metrics of whole sequences from the last values of the curves."""
    metrics = {}
    if "C" in last:
        metrics = {"sequence_kl": last["C"], "jeffreys": last["A"] + last["C"]}
    if "B" in last:
        with np.errstate(divide="ignore", invalid="ignore"):  # A is 0 for a perfect model
            excess = 100 * (last["B"] - last["A"]) / last["A"]
        metrics |= {"accumulated_kl": last["B"], "gap": last["G"], "excess_percent": excess}
    return metrics


def _outcome_means(
    weights: np.ndarray, outcomes: dict[str, Tensor], prefix: str
) -> dict[str, np.ndarray]:  # (R,) each
    return {
        prefix + name: _mean_over_decisions(weights, each[:, None])
        for name, each in outcomes.items()
    }


def entropy_drift(weights: np.ndarray, nll: Tensor, own_entropy: Tensor) -> np.ndarray:  # (R,)
    """Return mean entropy of own rollouts minus cross-entropy on the data, over the last half.

    It is in nats, and zero for a calibrated model that does not drift (Braverman et al. 2020,
    entropy-rate drift).
    """
    late = slice(own_entropy.shape[1] // 2, None)
    own = _mean_over_decisions(weights, own_entropy[:, late])
    return own - _mean_over_decisions(weights, nll[:, late])


def estimate(values: np.ndarray, n: int) -> Estimate:  # (R,)
    """Build an estimate over n units from the values under the bootstrap weights."""
    mean, lo, hi = percentiles(values)
    return Estimate(float(mean), float(lo), float(hi), n)


def magnitude(signed: Estimate) -> Estimate:
    """Return the estimate of |x| from that of x. Its interval contains 0 if that of x does."""
    ends = abs(signed.lo), abs(signed.hi)
    low = 0.0 if signed.lo <= 0 <= signed.hi else min(ends)
    return Estimate(abs(signed.mean), low, max(ends), signed.n)


def curve(values: np.ndarray) -> Curve:  # (R, H)
    """Build a curve from the values under the bootstrap weights."""
    mean, lo, hi = percentiles(values)
    return Curve(mean.tolist(), lo.tolist(), hi.tolist())


def _sums(weights: np.ndarray, values: Tensor) -> tuple[np.ndarray, np.ndarray]:  # (R, H) twice
    """Sum the weighted values, and the weights, of the entries of (B, H) that are not NaN."""
    array = values.double().cpu().numpy()
    total = weights @ np.where(np.isfinite(array), array, 0.0)
    total[weights @ np.isinf(array) > 0] = np.inf  # set it here, because 0 * inf would give NaN
    return total, weights @ ~np.isnan(array)


def _mean_over_episodes(weights: np.ndarray, values: Tensor) -> np.ndarray:  # (R, H)
    """Average over all episodes at each step, where ended episodes count as 0."""
    total, _ = _sums(weights, values)
    return total / weights.sum(1, keepdims=True)


def _mean_over_decisions(weights: np.ndarray, values: Tensor) -> np.ndarray:  # (R,)
    """Average over all graded decisions. The result is NaN if there are none."""
    total, count = _sums(weights, values)
    with np.errstate(invalid="ignore"):
        return total.sum(1) / count.sum(1)


def _share_alive(weights: np.ndarray, alive: Tensor) -> np.ndarray:  # (R, H)
    """Return the share of episodes that still run after each decision."""
    return weights @ alive.double().numpy() / weights.sum(1, keepdims=True)


def _count_graded(values: Tensor) -> list[int]:  # (H,)
    return (~values.isnan()).sum(0).tolist()
