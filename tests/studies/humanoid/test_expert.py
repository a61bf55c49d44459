"""Test that the experts are mirrored PD controllers, and those in the repository walk."""

import numpy as np
import pytest

from studies.humanoid.body import (
    ACTUATORS,
    ANGLES,
    GEAR,
    LIMIT,
    N_ACTIONS,
    N_COORDINATES,
    VELOCITIES,
    mirror,
    mirror_actions,
)
from studies.humanoid.episodes import rollout
from studies.humanoid.expert import FOLDER, KD, KP, Q0, SHAPES, Expert, load_expert, pd_actions

NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))


def random_arrays(**changes):
    random = np.random.default_rng(0)
    arrays = {name: random.normal(0, 0.3, shape) for name, shape in SHAPES.items()}
    return arrays | {"mean": np.zeros(N_COORDINATES), "scale": np.ones(N_COORDINATES)} | changes


def test_at_the_pose_and_at_rest_the_command_alone_acts():
    x = np.zeros((1, N_COORDINATES))
    x[0, ANGLES] = Q0
    u = np.linspace(-2, 2, N_ACTIONS)[None]
    np.testing.assert_allclose(pd_actions(x, u), np.clip(0.4 * u, -LIMIT, LIMIT))


@pytest.mark.parametrize("joint", ["abdomen_z", "right_hip_y", "left_knee", "left_elbow"])
def test_a_controller_returns_its_joint_and_damps_it(joint):
    i = ACTUATORS.index(joint)
    x = np.zeros((2, N_COORDINATES))
    x[:, ANGLES] = Q0
    x[0, ANGLES[i]] += 0.1
    x[1, VELOCITIES[i]] += 0.1
    torque = pd_actions(x, np.zeros((2, N_ACTIONS)))[:, i] * GEAR[i]
    np.testing.assert_allclose(torque, [-0.1 * KP[i], -0.1 * KD[i]], rtol=1e-9)


def test_exchanging_left_and_right_in_the_state_exchanges_them_in_the_action():
    expert, x = Expert(random_arrays()), np.random.default_rng(1).normal(0, 0.2, (5, N_COORDINATES))
    assert np.ptp(expert(x)) > 0.1
    np.testing.assert_allclose(expert(mirror(x)), mirror_actions(expert(x)), atol=1e-12)


def test_an_expert_reads_the_first_45_numbers_of_an_observation():
    expert, observations = load_expert(NAMES[0]), np.random.default_rng(0).normal(size=(3, 348))
    np.testing.assert_array_equal(expert(observations), expert(observations[:, :N_COORDINATES]))


def test_an_unknown_expert_is_refused():
    with pytest.raises(ValueError, match=r"no expert 'run-0': use one of walk-0, .*train_expert"):
        load_expert("run-0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W1": np.zeros((3, 3))}, r"W1: expected \(128, 128\), found \(3, 3\)"),
        ({"W3": np.zeros(3)}, r"W3: expected no such array, found \(3,\)"),
    ],
)
def test_a_file_with_other_arrays_is_refused(tmp_path, changes, message):
    np.savez(tmp_path / "mine.npz", allow_pickle=False, **random_arrays(**changes))
    with pytest.raises(ValueError, match=rf"mine\.npz does not hold a walking expert: {message}"):
        load_expert(tmp_path / "mine.npz")


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_a_file_that_is_not_an_archive_is_refused(tmp_path, content):
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"mine\.npz does not hold a walking expert"):
        load_expert(tmp_path / "mine.npz")


def test_an_error_names_the_missing_array():
    arrays = random_arrays()
    del arrays["b2"]
    with pytest.raises(ValueError, match=r"b2: expected \(17,\), found none"):
        Expert(arrays)


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x == "walk-1" else [pytest.mark.slow]) for x in NAMES]
)
def test_the_experts_in_the_repository_walk(name):
    assert (FOLDER / f"{name}.npz").stat().st_size < 200_000
    expert = load_expert(name)
    assert {array.dtype for array in expert.arrays.values()} == {np.dtype(np.float32)}
    episodes = rollout(expert, 3, seed=0)
    assert np.median(episodes.lengths) == 1000  # about one episode in a hundred ends in a fall
    assert np.median(episodes.returns) > 5900
