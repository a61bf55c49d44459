"""Photograph a humanoid several times on its way, as a stroboscope does.

On Linux without a display, MuJoCo draws if the environment variable MUJOCO_GL is `egl` or `osmesa`
from the start of Python. Neither needs a GPU.
"""

import numpy as np

from studies.humanoid.episodes import Policy
from studies.humanoid.simulator import HumanoidEnv, mujoco

PIXELS_PER_METRE = 220
WIDTH, LOW, HIGH = 3.0, -0.1, 1.8  # metres around the torso, and above the floor
FLOOR = 0  # its number among the shapes of the model


def film(start: int, actions: np.ndarray, policy: Policy, steps: int) -> np.ndarray:
    """Return the positions (steps, 24) in one episode of `rollout`, continued after a fall.

    Args:
        start: the seed of the first state, see `first_states`.
        actions: (length, 17), of the episode. After them, the policy acts.
    """
    environment = HumanoidEnv(terminate_when_unhealthy=False)
    state = environment.reset(seed=start)[0]
    positions = []
    for i in range(steps):
        positions.append(environment.data.qpos.copy())
        action = actions[i] if i < len(actions) else policy(state[None].astype(np.float32))[0]
        state = environment.step(action.astype(np.float32))[0]
    environment.close()
    return np.stack(positions)


class Camera:
    """Draw single positions from the side, without perspective, on a transparent background.

    Raises:
        RuntimeError: There is no OpenGL for drawing off screen.
    """

    def __init__(self) -> None:
        self.model = HumanoidEnv().model
        self.data = mujoco.MjData(self.model)
        self.model.vis.global_.orthographic = 1
        self.model.vis.global_.fovy = HIGH - LOW  # in metres, because there is no perspective
        size = [round(metres * PIXELS_PER_METRE) for metres in (HIGH - LOW, WIDTH)]
        self.model.vis.global_.offheight, self.model.vis.global_.offwidth = size
        try:
            self.renderer = mujoco.Renderer(self.model, *size)
        except Exception as error:  # of three libraries, each with exceptions of its own
            raise RuntimeError(
                f"MuJoCo cannot draw off screen ({error}): set MUJOCO_GL=egl, which needs libegl1, "
                "or MUJOCO_GL=osmesa, which needs libosmesa6"
            ) from error
        self.camera = mujoco.MjvCamera()
        mujoco.mjv_defaultFreeCamera(self.model, self.camera)
        self.camera.azimuth, self.camera.elevation = 90, 0

    def __call__(self, position: np.ndarray) -> np.ndarray:
        """Return a picture (height, width, 4) uint8 of a position (24,), centred on the torso."""
        self.data.qpos[:] = position
        mujoco.mj_forward(self.model, self.data)
        self.camera.lookat[:] = position[0], position[1], (LOW + HIGH) / 2
        self.renderer.disable_segmentation_rendering()
        self.renderer.update_scene(self.data, self.camera)
        colours = self.renderer.render().copy()
        self.renderer.enable_segmentation_rendering()
        self.renderer.update_scene(self.data, self.camera)
        is_body = self.renderer.render()[..., 0] > FLOOR  # the background is -1
        return np.dstack([colours, 255 * is_body.astype(np.uint8)])


def strobe(positions: np.ndarray, every: int, length: float) -> np.ndarray:
    """Return one picture (height, width, 4) uint8 that shows some of the positions (steps, 24).

    It covers half a metre behind the start and `length` metres ahead of it.
    """
    camera, behind = Camera(), 0.5
    height, width = (round(m * PIXELS_PER_METRE) for m in (HIGH - LOW, length + behind))
    margin = round(WIDTH * PIXELS_PER_METRE)  # so that every picture fits
    canvas = np.zeros((height, width + 2 * margin, 4), np.uint8)
    for position in positions[::every]:
        middle = round((position[0] - positions[0, 0] + behind) * PIXELS_PER_METRE)
        left = margin + middle - margin // 2
        if not 0 <= left <= width + margin:
            continue
        picture = camera(position)
        part = canvas[:, left : left + picture.shape[1]]
        is_body = picture[..., 3] > 0
        part[is_body] = picture[is_body]
    return canvas[:, margin : margin + width]
