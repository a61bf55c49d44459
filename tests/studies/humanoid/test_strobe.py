"""Test that a photograph shows the humanoid at its place, on a transparent background."""

import os
import subprocess
import sys

import numpy as np
import pytest

from studies.humanoid.episodes import first_states, rollout
from studies.humanoid.grading import never_acts
from studies.humanoid.strobe import film

DRAW = """
import numpy as np
from studies.humanoid.strobe import PIXELS_PER_METRE, Camera, film, strobe
from studies.humanoid.expert import load_expert
try:
    Camera()
except RuntimeError as error:
    print(error)
    raise SystemExit(77)
positions = film(7, np.zeros((0, 17)), load_expert("walk-1"), 60)
one, two = strobe(positions[:1], 1, 2.0), strobe(positions[[0, -1]], 1, 2.0)
columns = np.flatnonzero(one[..., 3].any(0)) / PIXELS_PER_METRE - 0.5
assert -0.4 < columns.min() < 0 < columns.max() < 0.6, columns  # metres from the torso
rows = np.flatnonzero(one[..., 3].any(1)) / PIXELS_PER_METRE
assert 1.3 < rows.max() - rows.min() < 1.7, rows  # it stands upright
assert (two[one[..., 3] > 0][:, 3] == 255).all()
assert two[..., 3].sum() > 1.3 * one[..., 3].sum()
"""


def test_a_film_repeats_an_episode_and_goes_on_after_the_fall():
    episodes = rollout(never_acts, 2, 0)
    length = episodes.lengths[1]
    start, actions = first_states(2, 0)[1], episodes.actions[1]
    positions = film(start, actions, never_acts, length + 50)
    heights = episodes.observations[1][:, 0]
    np.testing.assert_array_equal(positions[:length, 2].astype(np.float32), heights)
    assert len(positions) == length + 50
    assert positions[-1, 2] < 0.5 < heights[-1]  # metres; it lies on the floor


def test_a_photograph_is_centred_on_the_humanoid():
    """Draw in another process, because MuJoCo chooses its renderer when it is imported."""
    environment = {"MUJOCO_GL": "egl"} | os.environ
    command = [sys.executable, "-c", DRAW]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 77:
        assert "set MUJOCO_GL=egl" in done.stdout
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stderr
