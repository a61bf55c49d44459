"""Test that the joints are those of the model, and the mirror is a symmetry of the physics."""

import numpy as np
import pytest

from studies.humanoid.body import (
    ACTUATORS,
    ANGLES,
    GEAR,
    JOINTS,
    N_ACTIONS,
    VELOCITIES,
    mirror,
    mirror_actions,
)
from studies.humanoid.simulator import mujoco
from studies.humanoid.training_physics import coarse_model

AT_REST = np.array([1.4, 1, 0, 0, 0, *[0] * 17, *[0] * 23])  # a state x (45,)


def test_the_order_of_the_joints_and_the_gears_are_those_of_the_model():
    model = coarse_model()
    assert tuple(model.joint(i).name for i in range(1, model.njnt)) == JOINTS
    assert tuple(model.actuator(i).name for i in range(model.nu)) == ACTUATORS
    np.testing.assert_array_equal(model.actuator_gear[:, 0], GEAR)
    joints = model.actuator_trnid[:, 0]
    np.testing.assert_array_equal(model.jnt_qposadr[joints] - 2, ANGLES)
    np.testing.assert_array_equal(model.jnt_dofadr[joints] + 22, VELOCITIES)


def random_state(random, height):
    """Return a state (45,) with a tilted torso, bent joints and velocities."""
    x = AT_REST + random.uniform(-0.2, 0.2, AT_REST.shape)
    x[0] = height
    x[1:5] /= np.linalg.norm(x[1:5])
    return x


def step(model, x, actions):
    """Return the state (45,) after five steps of the simulator."""
    data = mujoco.MjData(model)
    data.qpos[2:], data.qvel[:], data.ctrl[:] = x[:22], x[22:], actions
    mujoco.mj_step(model, data, nstep=5)
    return np.concatenate([data.qpos[2:], data.qvel])


def is_mirrored(model, height, atol):
    """Return whether mirroring a state and the actions mirrors the state reached."""
    random = np.random.default_rng(0)
    for _ in range(5):
        x, actions = random_state(random, height), random.uniform(-0.4, 0.4, N_ACTIONS)
        mirrored = step(model, mirror(x[None])[0], mirror_actions(actions[None])[0])
        if not np.allclose(mirrored, mirror(step(model, x, actions)[None])[0], atol=atol):
            return False
    return True


@pytest.mark.parametrize("height", [1.4, 1.2, 1.1])  # in the air, touching the ground, sunk into it
def test_the_mirror_is_a_symmetry_of_the_physics(height):
    model = coarse_model()
    assert not is_mirrored(model, height, atol=1e-6)  # the model is not quite symmetric:
    model.jnt_stiffness[model.joint("left_knee").id] = 0  # 1, but 0 on the right
    model.dof_armature[model.joint("left_hip_y").dofadr] = 0.008  # 0.01, but 0.008 on the right
    mujoco.mj_setConst(model, mujoco.MjData(model))
    assert is_mirrored(model, height, atol=1e-6)


def test_mirroring_twice_changes_nothing():
    random = np.random.default_rng(0)
    x, actions = random.normal(size=(3, 45)), random.normal(size=(3, N_ACTIONS))
    np.testing.assert_array_equal(mirror(mirror(x)), x)
    np.testing.assert_array_equal(mirror_actions(mirror_actions(actions)), actions)
