"""Describe the joints of Humanoid-v5: their order, their gears and the left-right mirror.

The first 45 of the 348 numbers of an observation are the joint coordinates and velocities:

    x = (height, quaternion w x y z, 17 joint angles, velocity x y z, angular velocity x y z,
         17 joint velocities)

The joints are numbered in the order of `x`, and the actions in the order of the actuators, which
swaps the first two joints.
"""

import numpy as np

LEG, ARM = ("hip_x", "hip_z", "hip_y", "knee"), ("shoulder1", "shoulder2", "elbow")
SIDES = ("right", "left")
JOINTS = (
    *("abdomen_z", "abdomen_y", "abdomen_x"),
    *(f"{side}_{joint}" for side in SIDES for joint in LEG),
    *(f"{side}_{joint}" for side in SIDES for joint in ARM),
)
ACTUATORS = ("abdomen_y", "abdomen_z", *JOINTS[2:])
GEARS = {  # torque in N m of an action of 1
    **dict.fromkeys(("abdomen_z", "abdomen_y", "abdomen_x", "hip_x", "hip_z"), 100.0),
    "hip_y": 300.0,
    "knee": 200.0,
    **dict.fromkeys(("shoulder1", "shoulder2", "elbow"), 25.0),
}
LIMIT = 0.4  # the largest action
N_COORDINATES, N_ACTIONS = 45, len(ACTUATORS)
TURNS_OVER = ("abdomen_z", "abdomen_x", "shoulder1", "shoulder2")  # the mirror changes their sign


def kind(joint: str) -> str:
    """Return the name of a joint without its side."""
    return joint.removeprefix("right_").removeprefix("left_")


def opposite(joint: str) -> str:
    """Return the same joint of the other side, or the joint itself if it has no side."""
    side, _, rest = joint.partition("_")
    return {"right": f"left_{rest}", "left": f"right_{rest}"}.get(side, joint)


def _mirrored(joints: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the permutation and the signs by which the mirror changes the values of joints."""
    order = [joints.index(opposite(joint)) for joint in joints]
    return np.array(order), np.array([-1 if kind(joint) in TURNS_OVER else 1 for joint in joints])


ANGLES = np.array([5 + JOINTS.index(name) for name in ACTUATORS])  # of the actuated joints, in x
VELOCITIES = ANGLES + 23  # of the actuated joints, in x
GEAR = np.array([GEARS[kind(name)] for name in ACTUATORS])
ACTION_ORDER, ACTION_SIGNS = _mirrored(ACTUATORS)
_joint_order, _joint_signs = _mirrored(JOINTS)
ORDER = np.concatenate([np.arange(5), 5 + _joint_order, np.arange(22, 28), 28 + _joint_order])
SIGNS = np.concatenate([[1, 1, -1, 1, -1], _joint_signs, [1, -1, 1, -1, 1, -1], _joint_signs])


def coordinates(observations: np.ndarray) -> np.ndarray:
    """Return the joint coordinates and velocities in observations: (n, 348) -> (n, 45)."""
    return observations[:, :N_COORDINATES]


def mirror(x: np.ndarray) -> np.ndarray:
    """Exchange left and right in joint coordinates and velocities: (n, 45) -> (n, 45)."""
    return x[:, ORDER] * SIGNS


def mirror_actions(actions: np.ndarray) -> np.ndarray:
    """Exchange left and right in actions: (n, 17) -> (n, 17)."""
    return actions[:, ACTION_ORDER] * ACTION_SIGNS
