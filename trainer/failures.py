"""Say in one sentence why a run failed: a lost process, too little memory, divergence."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

GRACE_S = 3.0  # seconds to wait after losing a process, so that its own error is printed first
LOSS_MESSAGES = (
    "Connection closed",
    "Connection reset",
    "Connection refused",
    "Broken pipe",
    "imed out",  # "Timed out", "timed out"
    "timeout caused pair closure",  # of gloo, for a collective after one that timed out
)
MEMORY_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory")


class ProcessLost(RuntimeError):
    """Another process ended, or did not answer in time."""


class TrainingDiverged(RuntimeError):
    """A loss or gradient was not finite, in too many steps in a row or in the last one.

    Or a weight, an average of the weights or a tensor of an optimizer's state is not finite.
    """


class MemoryExhausted(RuntimeError):
    """The device or the machine has too little memory for the run."""


def smaller_run(micro_batch_size: int) -> str:
    """Say what to do if a run needs too much memory."""
    return (
        f"use a micro_batch_size below {micro_batch_size}, which does not change the results, a "
        "smaller block_size, or a smaller model"
    )


@contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Raise MemoryExhausted, with what to do, in place of the errors of allocators."""
    try:
        yield
    except MemoryExhausted:
        raise
    except (RuntimeError, MemoryError) as error:
        is_plain = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not is_plain and not any(text in str(error) for text in MEMORY_MESSAGES):
            raise
        raise MemoryExhausted(
            f"the memory does not suffice ({first_line(error) or 'MemoryError'}); {remedy}"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return str(error).partition("\n")[0].strip().rstrip(".")


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
