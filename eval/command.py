"""Helpers for the command-line programs in eval/, studies/ and bench/."""

import argparse
import signal
from typing import NoReturn


def command_parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """Return a parser for `python -m <module>` whose help shows `about` with its line breaks."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def leave_on_signals() -> None:
    """Exit with 128 + signal number on SIGINT, SIGTERM or SIGHUP, and run `finally` blocks."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
