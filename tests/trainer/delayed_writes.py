"""Delay the checkpoints that a run writes in the background until it has trained on."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

import train
from trainer.checkpoint import background


@contextmanager
def delayed_writes(n_steps: int) -> Iterator[list[int]]:
    """Start every write in the background `n_steps` steps after its save; yield these steps."""
    may_start, due, delayed = threading.Event(), 0, []
    count_step = train.TrainState.count_step

    def counting(self, is_finite):
        nonlocal due
        count_step(self, is_finite)
        due -= 1
        if due == 0:
            delayed.append(self.step)
            may_start.set()

    class Delayed(ThreadPoolExecutor):
        def submit(self, write):
            nonlocal due
            may_start.clear()
            due = n_steps

            def wait_and_write():
                assert may_start.wait(60)
                return write()

            return super().submit(wait_and_write)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(background, "ThreadPoolExecutor", Delayed)
        patch.setattr(train.TrainState, "count_step", counting)
        yield delayed
