"""SIGTERM and Ctrl-C as a flag that the loop looks at, so that a run ends with a checkpoint."""

import os
import signal
from types import FrameType


class StopRequest:
    """Truthy once SIGTERM or SIGINT came; a second signal ends the process at once.

    Used as a context manager: the former handlers are back on exit. After a clean stop the process
    exits with `exit_code`, 128 + the signal's number, as a shell would report it.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signum = 0

    def __enter__(self) -> "StopRequest":
        self._former = {signum: signal.signal(signum, self._handle) for signum in self.SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._former.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            os._exit(128 + signum)
        self.signum = signum

    def __bool__(self) -> bool:
        return self.signum != 0

    def __str__(self) -> str:
        return signal.Signals(self.signum).name if self.signum else "none"

    @property
    def exit_code(self) -> int:
        return 128 + self.signum if self.signum else 0
