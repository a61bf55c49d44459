"""SIGTERM and Ctrl-C as a flag that the loop looks at, so that a run ends with a checkpoint."""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

REPEAT_S = 5.0  # a launcher passes on to its processes what a scheduler sent to all of them


class StopRequest:
    """Truthy once SIGTERM or SIGINT came; a second signal ends the process at once.

    Used as a context manager: the former handlers are back on exit. After a clean stop the process
    exits with `exit_code`, 128 + the signal's number, as a shell would report it.

    Several processes give an `agree`, the largest of their numbers: then what one of them was sent
    holds from the next `poll`, which all call at the same point, and the same signal again within
    REPEAT_S is not a second one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, all_reduce_flag: Callable[[int], int] | None = None) -> None:
        self.signum = 0
        self._received, self._since = 0, 0.0
        self._agree = all_reduce_flag

    def __enter__(self) -> "StopRequest":
        self._former = {signum: signal.signal(signum, self._handle) for signum in self.SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._former.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        is_repeat = self._agree is not None and time.monotonic() - self._since < REPEAT_S
        if self._received and not is_repeat:
            os._exit(128 + signum)
        if not self._received:
            self._received, self._since = signum, time.monotonic()
        if self._agree is None:
            self.signum = signum

    def poll(self) -> bool:
        """Whether to stop, as of now."""
        if self._agree is not None:
            self.signum = self._agree(self._received)
        return bool(self)

    def __bool__(self) -> bool:
        return self.signum != 0

    def __str__(self) -> str:
        return signal.Signals(self.signum).name if self.signum else "none"

    @property
    def exit_code(self) -> int:
        return 128 + self.signum if self.signum else 0
