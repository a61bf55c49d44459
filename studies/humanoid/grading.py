"""Grade a policy by rollouts in the unchanged Humanoid-v5 and by its error on the expert's states.

return              sum of the rewards of an episode, by which policies are ranked
shortfall           1 - return / mean return of the expert, see task.py
falls               share of the episodes that end in a fall, before 1,000 steps
length              steps of an episode
val_loss            mean squared error of an action on states of the expert's validation episodes
action_error_steps_A-B
                    mean squared error of an action, against the expert's in the same state, on the
                    policy's own states in these steps; null if all episodes ended before
curves              survival: the share of episodes that go on, after every STRIDE steps
                    action_error: as above, the mean over STRIDE steps

Squared errors are means over the 17 dimensions of an action, divided by the variance of the
demonstrated actions, here without the task's `label_noise`. Intervals are over episodes.
"""

import numpy as np

from eval.rollout.intervals import bootstrap_weights
from eval.rollout.metrics import Grade, curve, estimate
from studies.humanoid.body import N_ACTIONS
from studies.humanoid.cloning import spread
from studies.humanoid.demonstrations import demonstrations_of, expert_policy
from studies.humanoid.episodes import LIMIT_STEPS, Policy, rollout
from studies.humanoid.task import Humanoid

GRADING_SEED = 2  # of the first states; the demonstrations have smaller ones
WINDOWS = ((0, 20), (20, 40), (40, 60))  # steps
STRIDE = 10  # steps between two points of a curve


def grade_policy(task: Humanoid, policy: Policy, n: int, seed: int) -> Grade:
    """Grade a policy on n episodes, whose first states depend on `seed` alone."""
    data, expert = demonstrations_of(task), expert_policy(task.expert)
    episodes = rollout(policy, n, GRADING_SEED + seed)
    experts = [expert(states) for states in episodes.observations]
    scale = spread(data.actions)
    errors = squared_errors(episodes.actions, experts, scale)  # (n, LIMIT_STEPS)
    chosen = [policy(states) for states in data.val_observations]
    val_errors = squared_errors(chosen, data.val_actions, scale)
    weights = bootstrap_weights(n)
    falls = episodes.lengths < LIMIT_STEPS
    returns = mean(weights, episodes.returns)
    metrics = {
        "return": estimate(returns, n),
        "shortfall": estimate(1 - returns / data.expert_return, n),
        "falls": estimate(mean(weights, falls), n),
        "length": estimate(mean(weights, episodes.lengths), n),
        "val_loss": estimate(mean(bootstrap_weights(len(chosen)), val_errors), len(chosen)),
    }
    for start, end in WINDOWS:
        in_window = mean(weights, errors[:, start:end])
        metrics[f"action_error_steps_{start}-{end}"] = estimate(in_window, n)
    steps = np.arange(STRIDE, LIMIT_STEPS + 1, STRIDE)
    goes_on = ~falls[:, None] | (episodes.lengths[:, None] > steps)  # (n, points)
    along = [mean(weights, each) for each in np.split(errors, len(steps), axis=1)]
    curves = {
        "survival": curve(np.stack([mean(weights, each) for each in goes_on.T], axis=1)),
        "action_error": curve(np.stack(along, axis=1)),
    }
    return Grade(metrics=metrics, curves=curves)


def squared_errors(actions: list[np.ndarray], others: list[np.ndarray], scale: float) -> np.ndarray:
    """Return the squared differences of scaled actions (length, 17), averaged over dimensions.

    Returns:
        (n, LIMIT_STEPS), with NaN after the end of an episode.
    """
    errors = np.full((len(actions), LIMIT_STEPS), np.nan)
    for row, own, other in zip(errors, actions, others, strict=True):
        row[: len(own)] = np.square((own.astype(np.float64) - other) / scale).mean(1)
    return errors


def mean(weights: np.ndarray, values: np.ndarray) -> np.ndarray:  # (R, n), (n, ...) -> (R,)
    """Average the values that are not NaN, with a weight for each episode."""
    values = values.reshape(len(values), -1).astype(np.float64)  # (n, steps)
    sums, counts = np.nansum(values, axis=1), (~np.isnan(values)).sum(1)  # (n,)
    with np.errstate(invalid="ignore"):
        return (weights @ sums) / (weights @ counts)


def never_acts(observations: np.ndarray) -> np.ndarray:
    """Return no torque for any observation (n, d)."""
    return np.zeros((len(observations), N_ACTIONS), np.float32)
