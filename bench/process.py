"""Run commands whose processes all end with them."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 10


@contextmanager
def running(
    command: list[str], environment: Mapping[str, str], output: IO[Any] | None = None
) -> Iterator[subprocess.Popen]:
    """Start a command in ROOT; at the end of the context, end every process that it started.

    `output` receives its standard output and its errors. By default it has those of this process.
    """
    errors = None if output is None else subprocess.STDOUT
    streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": errors}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, **streams
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            try:
                os.killpg(process.pid, signal.SIGTERM)  # lets it remove its temporary files
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_S)
            finally:
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def exit_code(
    command: list[str],
    environment: Mapping[str, str],
    limit_s: float,
    output: IO[Any] | None = None,
) -> int | None:
    """Run a command and return its exit code, or None if it takes longer than `limit_s`."""
    with running(command, environment, output) as process:
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
