"""What the commands of eval/ and bench/ share: a parser whose help is the module's docstring."""

import argparse
import signal
from typing import NoReturn


def command_parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """An empty parser for `python -m <module>`; its help shows `about` with its line breaks."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def leave_on_signals() -> None:
    """SIGINT, SIGTERM and SIGHUP end this command with 128 + signal, by way of its `finally`s."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
