"""Roll a policy out in the unchanged environment Humanoid-v5."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from studies.humanoid.simulator import gymnasium

LIMIT_STEPS = 1000  # an episode ends after so many steps, or when the humanoid falls
Policy = Callable[[np.ndarray], np.ndarray]  # observations (n, 348) -> actions (n, 17)


@dataclass
class Episodes:
    """Some episodes of one policy. The arrays end with the episodes."""

    returns: np.ndarray  # (n,)
    lengths: np.ndarray  # (n,), in steps
    observations: list[np.ndarray]  # n of (length, 348) float32
    actions: list[np.ndarray]  # n of (length, 17) float32

    @property
    def falls(self) -> float:
        """Return the share of the episodes that ended before the limit."""
        return float(np.mean(self.lengths < LIMIT_STEPS))


def first_states(n: int, seed: int) -> list[int]:
    """Return the seeds that draw the first states of n episodes."""
    return [int(start) for start in np.random.SeedSequence(seed).generate_state(n)]


def rollout(policy: Policy, n: int, seed: int, noise: float = 0.0) -> Episodes:
    """Run n episodes in lockstep, so that the policy sees all running episodes at once.

    The first states depend on `seed` and on the number of the episode alone.

    noise: standard deviation of Gaussian noise that is added to each action when it is executed.
        The episodes hold the actions without it.
    """
    environments = [gymnasium.make("Humanoid-v5", disable_env_checker=True) for _ in range(n)]
    states = [
        environment.reset(seed=start)[0]
        for environment, start in zip(environments, first_states(n, seed), strict=True)
    ]
    draws = [np.random.default_rng([seed, i]) for i in range(n)]
    returns = np.zeros(n)
    observations, actions = [[] for _ in range(n)], [[] for _ in range(n)]
    running = list(range(n))
    while running:
        seen = np.stack([states[i] for i in running]).astype(np.float32)  # (running, 348)
        chosen = policy(seen).astype(np.float32)  # (running, 17)
        ended = set()
        for i, observation, action in zip(running, seen, chosen, strict=True):
            executed = action + noise * draws[i].standard_normal(action.shape) if noise else action
            states[i], reward, terminated, truncated, _ = environments[i].step(executed)
            returns[i] += float(reward)
            observations[i].append(observation)
            actions[i].append(action)
            if terminated or truncated:
                ended.add(i)
        running = [i for i in running if i not in ended]
    for environment in environments:
        environment.close()
    lengths = np.array([len(each) for each in actions])
    return Episodes(returns, lengths, [*map(np.stack, observations)], [*map(np.stack, actions)])
