"""Test that training depends only on its seed and writes the mean of the trained policy."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from studies.humanoid import train_expert
from studies.humanoid.expert import load_expert, pd_actions
from studies.humanoid.ppo import GAMMA, LAMBDA, ActorCritic, Batch, Learner, advantages
from studies.humanoid.train_expert import RunningMoments, main, train
from studies.humanoid.training_physics import TrainingPhysics, reward_of
from tests.studies.humanoid.test_body import AT_REST


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train_expert, "N_HUMANOIDS", 4)
    monkeypatch.setattr(train_expert, "STEPS", 80)  # long enough for a fall
    monkeypatch.setattr(train_expert, "EPISODES", 1)


def trained(seed, iterations=2):
    """Return the weights after some iterations."""
    n_steps, model = list(islice(train(seed), iterations))[-1]
    assert n_steps == iterations * 4 * 80
    return model.expert_arrays()


def test_training_depends_only_on_the_seed():
    first, again, other = trained(0), trained(0), trained(1)
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    assert np.any(first["W2"] != other["W2"])


def test_the_command_writes_the_weights_and_the_curve(tmp_path, capsys):
    out = tmp_path / "mine.npz"
    assert main([f"--out={out}", "--max_steps=1"]) == 1
    assert "was not reached" in capsys.readouterr().err
    curve = json.loads(out.with_suffix(".json").read_text())["curve"]
    assert [row["steps"] for row in curve] == [320]
    assert curve[0]["falls"] == 1
    for name, array in load_expert(out).arrays.items():
        np.testing.assert_array_equal(array, trained(0, iterations=1)[name])


@pytest.mark.parametrize("argument", ["--out=mine.json", "--max_steps=0", "--seed=-1"])
def test_an_argument_that_cannot_be_used_is_refused(tmp_path, capsys, argument):
    with pytest.raises(SystemExit) as exit_:
        main([f"--out={tmp_path / 'mine.npz'}", argument])
    assert exit_.value.code == 2
    assert argument.partition("=")[0] in capsys.readouterr().err


def random_batch(model, T=5, n=3):
    torch.manual_seed(0)
    x, reached = torch.randn(2, T, n, 45)
    fell, timed_out = torch.rand(2, T, n) < 0.3
    with torch.no_grad():
        u = model.policy(x.flatten(0, 1)).sample().view(T, n, 17)
    return Batch(x, u, reached, torch.randn(T, n), fell, fell | timed_out)


def test_the_expert_of_a_model_is_the_mean_of_its_policy():
    torch.manual_seed(0)
    model, moments = ActorCritic(), RunningMoments()
    with torch.no_grad():
        model.actor[-1].weight.mul_(100)
    x = AT_REST + np.random.default_rng(0).normal(0, 0.2, (8, 45))
    moments.add(x)
    moments.copy_to(model)
    with torch.no_grad():
        u = model.policy(torch.as_tensor(x, dtype=torch.float32)).mean.numpy()
    actions = train_expert.Expert(model.expert_arrays())(x)
    np.testing.assert_allclose(actions, pd_actions(x, u), atol=1e-5)


def test_an_advantage_is_the_discounted_sum_of_errors_up_to_the_end_of_the_episode():
    model = ActorCritic()
    batch = random_batch(model)
    found, targets = advantages(model, batch)
    with torch.no_grad():
        values, later = model.value(batch.x), model.value(batch.reached)
    for i in range(3):
        for start in range(5):
            total, weight = 0.0, 1.0
            for t in range(start, 5):
                bootstrap = 0 if batch.fell[t, i] else GAMMA * later[t, i]
                total += weight * (batch.rewards[t, i] + bootstrap - values[t, i])
                weight *= GAMMA * LAMBDA
                if batch.ended[t, i]:
                    break
            torch.testing.assert_close(found[start, i], total)
            torch.testing.assert_close(targets[start, i], total + values[start, i])


def test_an_update_makes_rewarded_commands_more_likely():
    model = ActorCritic()
    batch = random_batch(model, T=64, n=16)
    batch.fell[:] = batch.ended[:] = True
    batch.rewards = batch.u[..., 3]
    learner = Learner(model, torch.Generator().manual_seed(0))
    for _ in range(3):
        learner.update(batch)
    with torch.no_grad():
        mean = model.policy(batch.x.flatten(0, 1)).mean
    assert mean[:, 3].mean() > 0.05


def test_a_humanoid_that_falls_starts_again():
    physics = TrainingPhysics(2, seed=0)
    physics.data[0].qpos[2] = 0.9
    reached, _, fell, timed_out = physics.step(np.zeros((2, 17)))
    assert (fell.tolist(), timed_out.tolist()) == ([True, False], [False, False])
    assert reached[0, 0] < 1 < physics.x[0, 0]
    assert physics.age.tolist() == [0, 1]


def test_an_episode_ends_at_the_limit_without_a_fall(monkeypatch):
    monkeypatch.setattr("studies.humanoid.training_physics.LIMIT_STEPS", 1)
    _, _, fell, timed_out = TrainingPhysics(1, seed=0).step(np.zeros((1, 17)))
    assert (fell.tolist(), timed_out.tolist()) == ([False], [True])


def test_the_reward_is_for_speed_ahead_in_an_upright_posture():
    x = np.tile(AT_REST, (5, 1))
    x[1:4, 22] = 1.0, 1.5, 2.5  # forward
    x[4, 1:5] = 0, 0, 0, 1  # turned round
    rewards = reward_of(x, np.zeros((5, 17)))
    np.testing.assert_allclose(rewards - rewards[0], [0, 1.25, 1.875, 1.875, -1], atol=1e-12)
