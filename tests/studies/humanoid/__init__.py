"""Test the study of the humanoid. The tests are skipped without its simulator."""

import pytest

for library in ("gymnasium", "mujoco"):
    pytest.importorskip(library, reason=f"{library} is not installed")
