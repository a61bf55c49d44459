"""Test that demonstrations are made once and are the beginnings of the expert's episodes."""

from dataclasses import replace

import numpy as np
import pytest

from studies.humanoid import demonstrations
from studies.humanoid.demonstrations import (
    N_VALIDATION,
    demonstrations_of,
    expert_policy,
    labels_of,
)
from studies.humanoid.episodes import Episodes
from studies.humanoid.task import Humanoid
from tests.studies.humanoid.small import SMALL


@pytest.fixture
def rollouts(monkeypatch, tmp_path):
    """Replace rollouts by random arrays, and return the list of those that were made."""
    made = []

    def rollout(policy, n, seed, noise=0.0):
        random = np.random.default_rng(seed)
        lengths = np.arange(n) + 3
        parts = [[random.standard_normal((k, d)) for k in lengths] for d in (348, 17)]
        made.append((seed, Episodes(random.uniform(size=n), lengths, *parts)))
        return made[-1][1]

    monkeypatch.setattr(demonstrations, "rollout", rollout)
    monkeypatch.setattr(demonstrations, "FOLDER", tmp_path)
    return made


def test_demonstrations_are_made_once_for_each_task(rollouts):
    first = demonstrations_of(Humanoid(demonstrations=2))
    assert len(rollouts) == 2  # training and validation
    np.testing.assert_array_equal(
        demonstrations_of(Humanoid(demonstrations=2)).actions, first.actions
    )
    demonstrations_of(Humanoid(demonstrations=2, width=8))  # the same demonstrations
    assert len(rollouts) == 2
    for other in ({"demonstrations": 3}, {"length": 5}, {"expert": "walk-1"}, {"noise": 0.1}):
        demonstrations_of(Humanoid(**{"demonstrations": 2} | other))
    assert len(rollouts) == 10


def test_demonstrations_are_the_beginnings_of_episodes_from_two_seeds(rollouts):
    data = demonstrations_of(Humanoid(demonstrations=2, length=4))
    (seed, training), (other_seed, validation) = rollouts
    assert seed != other_seed
    expected = np.concatenate([each[:4] for each in training.observations])
    np.testing.assert_array_equal(data.observations, expected)
    assert data.actions.shape == (3 + 4, 17)
    assert [len(each) for each in data.val_actions] == [3] + [4] * (N_VALIDATION - 1)
    for own, episode in zip(data.val_observations, validation.observations, strict=True):
        np.testing.assert_array_equal(own, episode[:4])
    assert data.expert_return == validation.returns.mean()


def test_the_demonstrated_actions_are_the_experts_without_noise():
    data = demonstrations_of(SMALL)
    expected = expert_policy(SMALL.expert)(data.observations)
    np.testing.assert_allclose(data.actions, expected, atol=1e-5)
    assert data.expert_return > 6000


def test_noise_changes_only_the_training_states():
    plain, noisy = demonstrations_of(SMALL), demonstrations_of(replace(SMALL, noise=0.08))
    expected = expert_policy(SMALL.expert)(noisy.observations)
    np.testing.assert_allclose(noisy.actions, expected, atol=1e-5)  # not what was executed
    np.testing.assert_array_equal(noisy.observations[0], plain.observations[0])
    assert np.all(np.any(noisy.observations[1:] != plain.observations[1:], axis=1))
    assert noisy.expert_return == plain.expert_return
    for own, other in zip(noisy.val_observations, plain.val_observations, strict=True):
        np.testing.assert_array_equal(own, other)


def test_label_noise_changes_only_the_labels():
    noisy_task = replace(SMALL, label_noise=0.5)
    plain, noisy = demonstrations_of(SMALL), demonstrations_of(noisy_task)
    for name, array in vars(plain).items():
        np.testing.assert_array_equal(getattr(noisy, name), array)
    np.testing.assert_array_equal(labels_of(SMALL, plain.actions), plain.actions)
    labels = labels_of(noisy_task, plain.actions)
    np.testing.assert_array_equal(labels_of(noisy_task, plain.actions), labels)
    assert (labels - plain.actions).std() == pytest.approx(0.5 * plain.actions.std(), rel=0.1)
