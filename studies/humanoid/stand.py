"""Define the standing expert: a linear-quadratic regulator (LQR) that balances on both feet.

    python -m studies.humanoid.stand

It needs no training: MuJoCo linearizes the dynamics around a pose in equilibrium, and the discrete
algebraic Riccati equation gives the gains. The coordinates are those of the tangent space without
the horizontal position, which the policy does not see: 21 differences of positions, 23 velocities.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.linalg import solve_discrete_are
from scipy.optimize import brentq

from eval.command import command_parser
from studies.humanoid.body import ANGLES, GEAR, LIMIT, N_ACTIONS, coordinates
from studies.humanoid.episodes import rollout
from studies.humanoid.simulator import HumanoidEnv, mujoco

KNEE = -0.15  # in rad
SUBSTEPS = 5  # of one step of Humanoid-v5
VELOCITY_COST, CONTROL_COST = 0.1, 10.0  # per squared unit; that of a position is 1
N_VELOCITIES = 23
ACTUATED = ANGLES + 1  # indices of the actuated joints in 23 velocities or forces


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """Return an argument between `low` and `high` at which the function is 0."""
    found: Any = brentq(function, low, high)
    return float(found)


class Standing:
    """A policy that keeps Humanoid-v5 on its feet without stepping."""

    def __init__(self) -> None:
        self.model = HumanoidEnv().model
        self.model.opt.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST  # mjd_transitionFD
        self.model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON  # refuses RK4 and needs convergence
        self.data = mujoco.MjData(self.model)
        hip = root(lambda hip: self._forces(self._height(hip), hip)[4], -0.6, 0.0)  # no pitch
        forces = self._forces(self._height(hip), hip)
        self.pose = self.data.qpos.copy()  # (24,)
        self.actions = forces[ACTUATED] / GEAR  # (17,)
        self.gains = self._gains()  # (17, 44)

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """Return the actions (n, 17) for observations (n, 348)."""
        x = coordinates(observations).astype(np.float64)
        errors = np.stack([self._error(each) for each in x])  # (n, 44)
        return np.clip(self.actions - errors @ self.gains.T, -LIMIT, LIMIT)

    def _error(self, x: np.ndarray) -> np.ndarray:
        """Return the difference of a state (45,) from the pose: (44,)."""
        difference, position = np.zeros(N_VELOCITIES), np.concatenate([self.pose[:2], x[:22]])
        mujoco.mj_differentiatePos(self.model, difference, 1.0, self.pose, position)
        return np.concatenate([difference[2:], x[22:]])

    def _forces(self, height: float, hip: float) -> np.ndarray:
        """Set the pose. Return the forces (23,) that would keep it at rest."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[2] = height
        for side in ("right", "left"):
            self.data.joint(f"{side}_knee").qpos = KNEE
            self.data.joint(f"{side}_hip_y").qpos = hip
        mujoco.mj_forward(self.model, self.data)
        self.data.qacc[:] = 0
        mujoco.mj_inverse(self.model, self.data)
        return self.data.qfrc_inverse

    def _height(self, hip: float) -> float:
        """Return the height of the torso at which the ground carries the weight."""
        self._forces(1.4, hip)
        foot = self.data.geom("right_foot")
        touching = 1.4 - float(foot.xpos[2] - self.model.geom("right_foot").size[0])
        lift = root(lambda lift: self._forces(touching + lift, hip)[2], -0.03, 0.002)
        return touching + lift

    def _gains(self) -> np.ndarray:
        """Return the gains of the regulator around the pose: (17, 44)."""
        n = 2 * N_VELOCITIES
        A, B = np.zeros((n, n)), np.zeros((n, N_ACTIONS))
        self.data.ctrl[:] = self.actions
        mujoco.mj_forward(self.model, self.data)
        mujoco.mjd_transitionFD(self.model, self.data, 1e-6, True, A, B, None, None)
        A, B = A[2:, 2:], B[2:]  # nothing depends on the horizontal position
        B = np.sum([np.linalg.matrix_power(A, k) @ B for k in range(SUBSTEPS)], axis=0)
        A = np.linalg.matrix_power(A, SUBSTEPS)
        costs = np.ones(len(A))
        costs[-N_VELOCITIES:] = VELOCITY_COST
        R = CONTROL_COST * np.eye(N_ACTIONS)
        S = solve_discrete_are(A, B, np.diag(costs), R)
        return np.linalg.solve(R + B.T @ S @ B, B.T @ S @ A)


def main() -> None:
    command_parser("studies.humanoid.stand", __doc__).parse_args()
    episodes = rollout(Standing(), 20, seed=0)
    print(f"return {episodes.returns.mean():.1f}, falls {episodes.falls:.2f}")


if __name__ == "__main__":
    main()
