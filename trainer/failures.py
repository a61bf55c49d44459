"""Find out which process failed first when several train together."""

from __future__ import annotations

import time
from typing import Any

from torch import distributed

GRACE_S = 3.0  # seconds to wait after losing a process, so that its own error is printed first
LOSS_MESSAGES = (
    "Connection closed",
    "Connection reset",
    "Connection refused",
    "Broken pipe",
    "imed out",  # "Timed out", "timed out"
)


class ProcessLost(RuntimeError):
    """Another process ended, or did not answer in time."""


def is_consequence(error: BaseException) -> bool:
    """Return whether `error` is what a process sees when another one has ended or hangs."""
    if not isinstance(error, RuntimeError):
        return False
    is_network = isinstance(error, distributed.DistError)
    return is_network or any(text in str(error) for text in LOSS_MESSAGES)


def cause_of_loss(store: Any, rank: int, size: int) -> str:
    """Describe which process failed first: one that reported an error, or one that is silent."""
    try:
        store.set(f"alive/{rank}", "")
        time.sleep(GRACE_S)
        failed = [each for each in range(size) if store.check([f"cause/{each}"])]
        silent = [each for each in range(size) if not store.check([f"alive/{each}"])]
        if failed:
            return f"rank {failed[0]} failed: {store.get(f'cause/{failed[0]}').decode()}"
        return f"rank {', '.join(map(str, silent))} ended or hangs" if silent else "network"
    except RuntimeError:  # the process that held the store has ended
        return "rank 0 ended"
