"""Turn signals that ask a run to end into a flag that the training loop polls before it saves."""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

REPEAT_S = 5.0  # seconds in which torchrun may forward a signal that the processes already got


class StopRequest:
    """Become truthy after SIGTERM, SIGINT, SIGHUP, SIGUSR1 or SIGUSR2.

    A second SIGTERM or SIGINT ends the process at once. The others never do: a closed terminal
    sends SIGHUP twice, and a scheduler sends SIGUSR1 or SIGUSR2 before SIGTERM. A SIGHUP that is
    ignored, as nohup does, stays ignored.

    Used as a context manager, which restores the former signal handlers on exit. After a clean stop
    the process should exit with `exit_code`: 128 + the signal's number, as shells report it.

    Args:
        start_max: function that starts to compute the maximum of a value over all processes and
            returns a function that waits for it. With it, all processes must call `poll` at the
            same points. A signal to any process takes effect in all of them at the second `poll`
            that follows, so that no `poll` waits for the slowest process. A signal repeated within
            `REPEAT_S` seconds is ignored.
    """

    URGENT = (signal.SIGTERM, signal.SIGINT)
    SIGNALS = (*URGENT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self, start_max: Callable[[int], Callable[[], int]] | None = None) -> None:
        self.signum = 0
        self._received = 0
        self._urgent_at: float | None = None  # when the first SIGTERM or SIGINT arrived
        self._start_max = start_max
        self._finish_max: Callable[[], int] | None = None  # of the newest poll

    def __enter__(self) -> "StopRequest":
        self._former = {
            signum: signal.signal(signum, self._handle)
            for signum in self.SIGNALS
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN
        }
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for signum, handler in self._former.items():
            signal.signal(signum, handler)
        if self._finish_max and error is None:  # leave no collective under way
            self._finish_max()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        is_shared = self._start_max is not None
        if signum in self.URGENT:
            now = time.monotonic()
            if self._urgent_at is None:
                self._urgent_at = now
            elif not (is_shared and now - self._urgent_at < REPEAT_S):
                os._exit(128 + signum)
        self._received = self._received or signum
        if not is_shared:
            self.signum = self._received

    def poll(self) -> bool:
        """Return whether to stop now."""
        if self._start_max and not self.signum:
            self.signum = self._finish_max() if self._finish_max else 0
            self._finish_max = None if self.signum else self._start_max(self._received)
        return bool(self)

    def __bool__(self) -> bool:
        return self.signum != 0

    def __str__(self) -> str:
        return signal.Signals(self.signum).name if self.signum else "none"

    @property
    def exit_code(self) -> int:
        return 128 + self.signum if self.signum else 0
