"""Define the walking expert: a PD controller around a pose, and a network of the joint state.

    a = clip(0.4 u + (kp (q0 - q) - kd q̇) / gear, ±0.4)
    u = (f(x) + mirror(f(mirror(x)))) / 2

`x` holds the 45 joint coordinates and velocities of body.py, and f is a network with two hidden
layers of ELU units and standardized inputs. Exchanging left and right in `x` exchanges left and
right in the action.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from studies.humanoid.body import (
    ACTUATORS,
    ANGLES,
    GEAR,
    LIMIT,
    N_ACTIONS,
    N_COORDINATES,
    VELOCITIES,
    coordinates,
    kind,
    mirror,
    mirror_actions,
)

FOLDER = Path(__file__).parent / "experts"
WIDTH = 128
CLIP_INPUTS = 5.0  # the largest standardized input
SHAPES = {  # of the arrays in a file
    "mean": (N_COORDINATES,),
    "scale": (N_COORDINATES,),
    "W0": (WIDTH, N_COORDINATES),
    "b0": (WIDTH,),
    "W1": (WIDTH, WIDTH),
    "b1": (WIDTH,),
    "W2": (N_ACTIONS, WIDTH),
    "b2": (N_ACTIONS,),
}
GAINS = {  # joint: kp in N m / rad, kd in N m s / rad
    **dict.fromkeys(("abdomen_z", "abdomen_y", "abdomen_x", "hip_y", "knee"), (100.0, 3.0)),
    **dict.fromkeys(("hip_x", "hip_z"), (60.0, 2.0)),
    **dict.fromkeys(("shoulder1", "shoulder2", "elbow"), (5.0, 1.0)),
}
POSE = {"hip_y": -0.25, "knee": -0.5}  # in rad; the other angles are 0
KP, KD = np.array([GAINS[kind(name)] for name in ACTUATORS]).T
Q0 = np.array([POSE.get(kind(name), 0.0) for name in ACTUATORS])


def pd_actions(x: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Return the actions (n, 17) for joint states x (n, 45) and commands u (n, 17)."""
    torque = KP * (Q0 - x[:, ANGLES]) - KD * x[:, VELOCITIES]
    return np.clip(LIMIT * u + torque / GEAR, -LIMIT, LIMIT)


def elu(z: np.ndarray) -> np.ndarray:
    return np.where(z > 0, z, np.expm1(np.minimum(z, 0)))


class Expert:
    """A policy of Humanoid-v5. `arrays` has the names and shapes of SHAPES.

    Raises:
        ValueError: An array is missing, has another shape, or is not known.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        found = {name: array.shape for name, array in arrays.items()}
        for name in SHAPES | found:
            if found.get(name) != SHAPES.get(name):
                expected = SHAPES.get(name, "no such array")
                raise ValueError(f"{name}: expected {expected}, found {found.get(name, 'none')}")
        self.arrays = arrays

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """Return the actions (n, 17) for observations (n, 348) or joint states (n, 45)."""
        x = coordinates(observations)
        return pd_actions(x, (self._f(x) + mirror_actions(self._f(mirror(x)))) / 2)

    def _f(self, x: np.ndarray) -> np.ndarray:  # (n, 45) -> (n, 17)
        arrays = self.arrays
        z = np.clip((x - arrays["mean"]) / arrays["scale"], -CLIP_INPUTS, CLIP_INPUTS)
        z = elu(z @ arrays["W0"].T + arrays["b0"])
        z = elu(z @ arrays["W1"].T + arrays["b1"])
        return z @ arrays["W2"].T + arrays["b2"]


def load_expert(name: str | Path) -> Expert:
    """Return a committed expert ("walk-0"), or the expert in a file ("some/folder/mine.npz").

    Raises:
        ValueError: There is no such expert, or the file does not hold one.
    """
    path = Path(name) if Path(name).suffix == ".npz" else FOLDER / f"{name}.npz"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in FOLDER.glob("*.npz")))
        make = "python -m studies.humanoid.train_expert --out FILE.npz"
        raise ValueError(f"no expert {str(name)!r}: use one of {known}, or make a file by `{make}`")
    try:
        with np.load(path) as file:
            return Expert(dict(file))
    except (ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} does not hold a walking expert: {error}") from None
