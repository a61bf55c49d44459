"""A study that is several commands: its stages, and the command line that chooses among them."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol, TypeVar

from eval.command import command_parser


class Stage(Protocol):
    """One command, in a folder under `out`."""

    @property
    def name(self) -> str: ...

    @property
    def command(self) -> ModuleType: ...  # has a main(argv)

    def argv(self, out: Path, workers: int) -> list[str]: ...


S = TypeVar("S", bound=Stage)


def chosen(
    argv: Sequence[str], stages: Sequence[S], name: str, about: str | None, out: str
) -> tuple[list[S], argparse.Namespace]:
    """The stages whose names begin as asked, all if none is asked; --out and --workers.

    about: the help, a docstring. out: the default. SystemExit if no stage begins so.
    """
    parser = command_parser(name, about)
    parser.add_argument("stages", nargs="*", help="; ".join(stage.name for stage in stages))
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    arguments = parser.parse_args(argv)
    prefixes = tuple(arguments.stages or [""])
    if not (found := [stage for stage in stages if stage.name.startswith(prefixes)]):
        parser.error(f"no stage begins with {', '.join(arguments.stages)}")
    return found, arguments


def run(stages: Sequence[Stage], out: Path, workers: int) -> None:
    for stage in stages:
        argv = stage.argv(out, workers)
        print(shlex.join(["python", "-m", stage.command.__name__, *argv]), flush=True)
        stage.command.main(argv)
