"""Helpers for the command-line programs in eval/, studies/ and bench/."""

import argparse
import io
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from data.files import user_path

DEVICES = ("auto", "cpu", "cuda", "mps")  # choices of an option --device; see pick_device


class ArgumentError(ValueError, argparse.ArgumentTypeError):
    """An argument cannot be used. The message says what was wanted."""


class CommandParser(argparse.ArgumentParser):
    """A parser that reports an error as one line with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")

    def print_help(self, file: Any = None) -> None:
        """Print the help. It is no error if the reader, such as `head`, stops early."""
        try:
            super().print_help(file)
            (file or sys.stdout).flush()
        except BrokenPipeError:
            sys.stdout = None  # or Python tries to flush it once more


def command_parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """Return a parser for `python -m <module>` whose help shows `about` with its line breaks.

    Arguments of `type=Path` refuse an empty text and expand `~`. From this call on, stdout and
    stderr escape the characters that the terminal's encoding does not have.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = CommandParser(
        prog=f"python -m {module}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.register("type", Path, path_argument)
    return parser


@contextmanager
def reported_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Report an error that a user can cause as one message with exit code 2.

    Exit quietly if the reader of the output is gone (`... | head`) and on Ctrl-C.
    """
    from trainer.checkpoint.read import CheckpointError  # imports torch, which is slow

    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = None  # or Python tries to flush it once more
        raise SystemExit(0) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (CheckpointError, ImportError, OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")


def positive_int(text: str) -> int:
    """Parse an integer of at least 1."""
    try:
        number = int(text)
    except ValueError:
        raise ArgumentError(f"{text!r} is not a whole number") from None
    if number < 1:
        raise ArgumentError(f"{text}: must be at least 1")
    return number


def at_least(low: int, **values: int | None) -> None:
    """Raise ArgumentError for each option that is given and below `low`."""
    if bad := [f"--{key}={n}" for key, n in values.items() if n is not None and n < low]:
        raise ArgumentError(f"{', '.join(bad)}: must be at least {low}")


def pick_device(name: str) -> str:
    """Resolve "auto" to "cuda" where a CUDA device is available and to "cpu" elsewhere.

    Raises:
        ValueError: "cuda" or "mps" was requested, but torch finds no such device.
    """
    from trainer.machine import device_of, missing_device  # imports torch, which is slow

    if problem := missing_device(name):
        raise ValueError(problem)
    return device_of(name).type


def path_argument(text: str | Path) -> Path:
    """Return a path with `~` expanded. Raises ArgumentError if it is empty or has no such user."""
    try:
        return user_path(text)
    except ValueError as error:
        raise ArgumentError(str(error)) from None


def output_file(text: str | Path) -> Path:
    """Return the path of a file that can be written. Raises ArgumentError if it cannot."""
    path = path_argument(text)
    if path.is_dir():
        raise ArgumentError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise ArgumentError(f"the folder {path.parent} does not exist")
    _check_writable(path.parent)
    return path


def output_folder(text: str | Path) -> Path:
    """Return the path of a folder that can be written or made. Raises ArgumentError otherwise."""
    path = path_argument(text)
    existing = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not existing.is_dir():
        raise ArgumentError(f"{existing} is not a folder")
    _check_writable(existing)
    return path


def _check_writable(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArgumentError(f"the folder {folder} cannot be written: {error.strerror}") from None


def leave_on_signals() -> None:
    """Exit with 128 + signal number on SIGINT, SIGTERM or SIGHUP, and run `finally` blocks."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
