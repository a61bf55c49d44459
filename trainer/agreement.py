"""Decide together: small values that the processes of a run exchange through their CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import distributed

from trainer.torchrun import environment_number

Result = TypeVar("Result")


class Agreement:
    """Decisions of `size` processes. All processes must call these methods together.

    The methods whose names begin with `start` do not wait for other processes. They return a
    function that does, which all processes must call at the same point, or none.
    """

    size: int

    def start_reduce(self, op: Literal["SUM", "MAX"], *values: int) -> Callable[[], list[int]]:
        """Start to reduce each of the values over the processes."""
        if self.size == 1:
            return lambda: [*values]
        reduced = torch.tensor(values)
        work = distributed.all_reduce(reduced, getattr(distributed.ReduceOp, op), async_op=True)

        def wait() -> list[int]:
            work.wait()  # pyright: ignore - None only in a process outside the group
            return reduced.tolist()

        return wait

    def start_all_reduce_flag(self, value: int) -> Callable[[], int]:
        """Start to compute the maximum of `value` over the processes."""
        wait = self.start_reduce("MAX", value)
        return lambda: wait()[0]

    def all_reduce_flag(self, value: int) -> int:
        """Return the maximum of `value` over the processes."""
        return self.start_all_reduce_flag(value)()

    def gather(self, value: Any) -> list[Any]:
        """Return the values that the processes pass, in order of rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def start_on_all_ranks(
        self,
        function: Callable[[], Result],
        kind: type[Exception],
        count: Callable[[Result], int] = lambda _: 0,
    ) -> Callable[[], tuple[Result, int]]:
        """Call `function`, and start to agree whether it raised an error of type `kind` anywhere.

        Returns:
            A function that returns the result, and the sum of `count(result)` over the processes.
            It raises an error of type `kind` in all processes if `function` raised one in any.
        """
        result: Any = None
        error, n = None, 0
        try:
            result = function()
            n = count(result)
        except kind as caught:
            error = caught
        wait = self.start_reduce("SUM", error is not None, n)

        def finish() -> tuple[Result, int]:
            n_failed, total = wait()
            if n_failed:
                messages = self.gather(error and str(error))
                rank, text = next((r, text) for r, text in enumerate(messages) if text is not None)
                raise error or kind(f"rank {rank}: {text}")
            return result, total

        return finish

    def raise_on_all_ranks(self, function: Callable[[], Result], kind: type[Exception]) -> Result:
        """Call `function`; raise an error of type `kind` in all processes if one raises it."""
        return self.start_on_all_ranks(function, kind)()[0]

    def main_process_first(self, function: Callable[[], Result]) -> Result:
        """Call `function` in one process per machine, then in the others, to share a file."""
        is_first = environment_number("LOCAL_RANK", 0) == 0
        result = function() if is_first else None
        self.all_reduce_flag(0)
        return result if is_first else function()  # pyright: ignore - `function` returned it
