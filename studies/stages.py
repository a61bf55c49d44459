"""Run a study that consists of several commands, or the stages that the command line selects."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol, TypeVar

from eval.command import command_parser


class Stage(Protocol):
    """One command, whose results go to a folder under `out`."""

    @property
    def name(self) -> str: ...

    @property
    def command(self) -> ModuleType: ...  # has a main(argv)

    def argv(self, out: Path, workers: int) -> list[str]: ...


S = TypeVar("S", bound=Stage)


def chosen(
    argv: Sequence[str], stages: Sequence[S], name: str, about: str | None, out: str
) -> tuple[list[S], argparse.Namespace]:
    """Parse the command line of a study.

    Args:
        argv: prefixes of stage names, --out and --workers.
        stages: all stages of the study.
        name: name of the command's module.
        about: help text.
        out: default of --out.
    Returns:
        The stages whose names begin with one of the prefixes (all without a prefix), and the
        arguments.
    Raises:
        SystemExit: no stage begins with a prefix.
    """
    parser = command_parser(name, about)
    parser.add_argument(
        "stages", nargs="*", help="prefixes of: " + ", ".join(stage.name for stage in stages)
    )
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args(argv)
    prefixes = tuple(arguments.stages or [""])
    if not (found := [stage for stage in stages if stage.name.startswith(prefixes)]):
        parser.error(f"no stage begins with {', '.join(arguments.stages)}")
    return found, arguments


def run(stages: Sequence[Stage], out: Path, workers: int) -> None:
    """Print and run the command of each stage."""
    for stage in stages:
        argv = stage.argv(out, workers)
        print(shlex.join(["python", "-m", stage.command.__name__, *argv]), flush=True)
        stage.command.main(argv)
