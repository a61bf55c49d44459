"""Simulate many humanoids with coarser physics and another reward, to train the expert alone.

A step takes 15 ms, as in Humanoid-v5, but computes the dynamics 3 times instead of 20 times.
"""

from typing import Any

import numpy as np

from studies.humanoid.body import N_COORDINATES
from studies.humanoid.episodes import LIMIT_STEPS
from studies.humanoid.simulator import HumanoidEnv, mujoco

SUBSTEPS, TIMESTEP = 3, 0.005
LOWEST, HIGHEST = 1.0, 2.0  # healthy heights of the torso, as in Humanoid-v5
NOISE = 1e-2  # of the first states, as in Humanoid-v5
MAX_SPEED = 1.5  # in m/s; more speed is not rewarded
ALIVE, UPRIGHT, HEADING = 2.0, 0.5, 0.5  # weights of the reward


def coarse_model() -> Any:
    """Return the `MjModel` of Humanoid-v5 with a cheaper integrator and a cheaper solver."""
    model = HumanoidEnv().model
    model.opt.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
    model.opt.timestep, model.opt.iterations = TIMESTEP, 10
    return model


def reward_of(x: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Return the rewards (n,) for reaching the states x (n, 45) by the actions (n, 17).

    `up` is the vertical part of the torso's z axis, and `ahead` is the forward part of its x axis.
    """
    _, i, j, k = x[:, 1:5].T  # the quaternion w + i x + j y + k z
    up, ahead = 1 - 2 * (i**2 + j**2), 1 - 2 * (j**2 + k**2)
    vx, vy = x[:, 22:24].T
    speed = 1.25 * np.minimum(vx, MAX_SPEED) - 0.3 * np.abs(vy)
    return speed + ALIVE + UPRIGHT * up + HEADING * ahead - 0.1 * (actions**2).sum(1)


class TrainingPhysics:
    """n humanoids that are stepped together. One that falls or reaches the limit starts again."""

    def __init__(self, n: int, seed: int) -> None:
        self.model = coarse_model()
        self.data = [mujoco.MjData(self.model) for _ in range(n)]
        self.random = np.random.default_rng(seed)
        self.age = np.zeros(n, int)  # in steps
        self.x = np.zeros((n, N_COORDINATES))  # the current states
        for i in range(n):
            self._reset(i)

    def _reset(self, i: int) -> None:
        data = self.data[i]
        mujoco.mj_resetData(self.model, data)
        data.qpos += self.random.uniform(-NOISE, NOISE, self.model.nq)
        data.qvel += self.random.uniform(-NOISE, NOISE, self.model.nv)
        self.age[i] = 0
        self._read(i)

    def _read(self, i: int) -> None:
        self.x[i, :22] = self.data[i].qpos[2:]
        self.x[i, 22:] = self.data[i].qvel

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Apply actions (n, 17) and start the ended episodes again.

        Returns:
            The states reached (n, 45), the rewards, which humanoids fell, and which reached the
            limit of an episode (n,).
        """
        for i, (data, action) in enumerate(zip(self.data, actions, strict=True)):
            data.ctrl[:] = action
            mujoco.mj_step(self.model, data, nstep=SUBSTEPS)
            self._read(i)
        self.age += 1
        reached = self.x.copy()
        fell = (reached[:, 0] <= LOWEST) | (reached[:, 0] >= HIGHEST)
        timed_out = ~fell & (self.age >= LIMIT_STEPS)
        for i in np.flatnonzero(fell | timed_out):
            self._reset(int(i))
        return reached, reward_of(reached, actions), fell, timed_out
