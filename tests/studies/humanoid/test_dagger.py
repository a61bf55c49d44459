"""Test that DAgger adds the clone's own states, labelled by the expert."""

import numpy as np
import pytest

from studies.humanoid import dagger
from studies.humanoid.dagger import (
    FRESH_SEEDS,
    METRICS,
    ROUNDS,
    STEPS,
    Setup,
    measure,
    own_states,
    table_of,
    train,
)
from studies.humanoid.demonstrations import TRAINING_SEED, VALIDATION_SEED
from studies.humanoid.episodes import rollout
from studies.humanoid.expert import load_expert
from studies.humanoid.grading import GRADING_SEED, never_acts

CLONING, DAGGER = (Setup("walk-1", "fast-dopr-adamw", method) for method in ("cloning", "DAgger"))


def test_added_states_are_the_clones_and_added_actions_are_the_experts():
    states, actions = own_states(never_acts, "walk-1", seed=3, episodes=2)
    episodes = rollout(never_acts, 2, seed=3)
    np.testing.assert_array_equal(states, np.concatenate(episodes.observations))
    assert len(actions) == episodes.lengths.sum() < 200  # it falls at once
    np.testing.assert_allclose(actions, load_expert("walk-1")(states), atol=1e-6)


def test_the_rounds_have_equal_lengths_and_first_states_of_their_own(monkeypatch):
    seen = {}
    monkeypatch.setattr(dagger, "clone_of", lambda *arguments: arguments)
    for seed in (0, *FRESH_SEEDS):
        task, settings, lr, own_seed, more = train(DAGGER, 0.5, seed)
        assert (task.expert, settings["max_steps"], lr, own_seed) == ("walk-1", STEPS, 0.5, seed)
        assert list(more) == [STEPS // ROUNDS * i for i in range(1, ROUNDS)]
        seen |= {(seed, step): call.keywords["seed"] for step, call in more.items()}
    assert len(set(seen.values())) == len(seen)
    assert not {*seen.values()} & {TRAINING_SEED, VALIDATION_SEED, GRADING_SEED}
    assert train(CLONING, 0.5, 0)[-1] == {}


def test_every_combination_is_tuned_on_one_seed_and_measured_on_others(monkeypatch):
    def train_and_grade(setup, lr, seed, n):
        assert (n == 1) == (seed == 0)
        value = 1000.0 * (setup.method == "DAgger") + 10 * seed
        return dict.fromkeys(METRICS, value) | {"val_loss": abs(np.log(lr / 4e-3)) + 1}

    monkeypatch.setattr(dagger, "train_and_grade", train_and_grade)
    rows = [measure(setup) for setup in (CLONING, DAGGER)]
    assert [row["lr"] for row in rows] == [4e-3, 4e-3]
    assert rows[0]["return"] == [10.0 * seed for seed in FRESH_SEEDS]
    assert table_of(rows).count("| +1,000 ± 0 |") == 1


def test_a_rate_that_diverges_is_not_chosen(monkeypatch):
    def train_and_grade(setup, lr, seed, n):
        return dict.fromkeys(METRICS, float("nan") if lr > 1e-3 else 1 / lr)

    monkeypatch.setattr(dagger, "train_and_grade", train_and_grade)
    assert measure(CLONING)["lr"] == pytest.approx(1e-3)
