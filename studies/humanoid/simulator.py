"""Import gymnasium and MuJoCo, which only the study of the humanoid needs."""

from typing import Any

try:
    import gymnasium
    import mujoco as _mujoco
    from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv
except ImportError as error:
    raise ImportError(
        f"the simulator of the humanoid cannot be imported ({error}): pip install '.[humanoid]'"
    ) from None

mujoco: Any = _mujoco  # its functions are compiled and have no types

__all__ = ["HumanoidEnv", "gymnasium", "mujoco"]
