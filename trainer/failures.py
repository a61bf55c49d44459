"""What a process that fails says about the others: who ended first, and why."""

from __future__ import annotations

import time
from typing import Any

from torch import distributed

GRACE_S = 3.0  # that those wait who lost a process, so that its error is the first to be seen
LOST = ("Connection closed", "Connection reset", "Connection refused", "Broken pipe", "imed out")


class ProcessLost(RuntimeError):
    """Another process ended, or did not answer in time."""


def is_aftermath(error: BaseException) -> bool:
    """Whether this is what a process sees when another one is gone or hangs."""
    if not isinstance(error, RuntimeError):
        return False
    is_network = isinstance(error, distributed.DistError)
    return is_network or any(text in str(error) for text in LOST)


def cause_of_loss(store: Any, rank: int, size: int) -> str:
    """Who failed first, as far as can be told: who says so, or else who says nothing."""
    try:
        store.set(f"alive/{rank}", "")
        time.sleep(GRACE_S)
        causes = [each for each in range(size) if store.check([f"cause/{each}"])]
        silent = [each for each in range(size) if not store.check([f"alive/{each}"])]
        if causes:
            return f"rank {causes[0]} failed: {store.get(f'cause/{causes[0]}').decode()}"
        return f"rank {', '.join(map(str, silent))} ended or hangs" if silent else "network"
    except RuntimeError:  # the store was in the process that ended
        return "rank 0 ended"
