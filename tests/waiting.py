"""Wait for what another process does."""

import time
from collections.abc import Callable

PATIENCE = 300  # seconds; a busy machine is slow


def wait_until(holds: Callable[[], object]) -> None:
    """Return as soon as `holds()` is true. Raises AssertionError after `PATIENCE`."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
