"""What the commands of eval/ and bench/ share: a parser whose help is the module's docstring."""

import argparse
import signal
from typing import NoReturn


def command_parser(name: str, about: str | None, package: str = "eval") -> argparse.ArgumentParser:
    """The empty parser of `python -m <package>.<name>`; the help keeps the lines of `about`."""
    return argparse.ArgumentParser(
        prog=f"python -m {package}.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def leave_on_signals() -> None:
    """SIGINT, SIGTERM and SIGHUP end this command with 128 + signal, by way of its `finally`s."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
