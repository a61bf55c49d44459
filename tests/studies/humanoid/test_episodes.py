"""Test that rollouts in the unchanged environment record states, actions and rewards."""

import importlib
import sys

import gymnasium
import numpy as np
import pytest

from studies.humanoid.episodes import rollout
from studies.humanoid.stand import Standing


def falling(observations):
    return np.full((len(observations), 17), 0.1)


def test_episodes_in_lockstep_equal_episodes_one_by_one():
    episodes = rollout(falling, 3, seed=0)
    assert episodes.falls == 1
    starts = np.random.SeedSequence(0).generate_state(3)
    for i, start in enumerate(starts):
        environment = gymnasium.make("Humanoid-v5")
        first, _ = environment.reset(seed=int(start))
        np.testing.assert_array_equal(episodes.observations[i][0], first.astype(np.float32))
        rewards, terminated = [], False
        while not terminated:
            action = falling(first[None])[0].astype(np.float32)
            _, reward, terminated, *_ = environment.step(action)
            rewards.append(reward)
        assert episodes.lengths[i] == len(rewards)
        assert episodes.returns[i] == pytest.approx(sum(rewards))
        assert episodes.observations[i].shape == (len(rewards), 348)
        assert episodes.actions[i].shape == (len(rewards), 17)


def test_another_seed_gives_other_episodes():
    first, again, other = (rollout(falling, 1, seed).observations[0][0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_the_standing_expert_stands():
    episodes = rollout(Standing(), 2, seed=0)
    assert episodes.falls == 0
    assert episodes.returns.min() > 4900


@pytest.mark.parametrize("missing", ["mujoco", "gymnasium"])
def test_a_missing_simulator_is_an_error_with_the_remedy(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "studies.humanoid.simulator")
    with pytest.raises(ImportError, match=rf"{missing}.*: pip install '\.\[humanoid\]'"):
        importlib.import_module("studies.humanoid.simulator")
