"""Turn SIGTERM and Ctrl-C into a flag that the training loop polls before it saves and stops."""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

REPEAT_S = 5.0  # seconds in which torchrun may forward a signal that the processes already got


class StopRequest:
    """Become truthy after SIGTERM or SIGINT; end the process at a second signal.

    Used as a context manager, which restores the former signal handlers on exit. After a clean stop
    the process should exit with `exit_code`: 128 + the signal's number, as shells report it.

    Args:
        all_reduce_flag: function that returns the maximum of a value over all processes. With it, a
            signal to any process takes effect in all of them at the next `poll`, which all must
            call at the same point, and a signal repeated within `REPEAT_S` seconds is ignored.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, all_reduce_flag: Callable[[int], int] | None = None) -> None:
        self.signum = 0
        self._received, self._received_at = 0, 0.0
        self._all_reduce_flag = all_reduce_flag

    def __enter__(self) -> "StopRequest":
        self._former = {signum: signal.signal(signum, self._handle) for signum in self.SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._former.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        is_shared = self._all_reduce_flag is not None
        is_repeat = is_shared and time.monotonic() - self._received_at < REPEAT_S
        if self._received and not is_repeat:
            os._exit(128 + signum)
        if not self._received:
            self._received, self._received_at = signum, time.monotonic()
        if not is_shared:
            self.signum = signum

    def poll(self) -> bool:
        """Return whether to stop now."""
        if self._all_reduce_flag is not None:
            self.signum = self._all_reduce_flag(self._received)
        return bool(self)

    def __bool__(self) -> bool:
        return self.signum != 0

    def __str__(self) -> str:
        return signal.Signals(self.signum).name if self.signum else "none"

    @property
    def exit_code(self) -> int:
        return 128 + self.signum if self.signum else 0
