"""Run a study that consists of several commands, or the stages that the command line selects."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

from eval.command import command_parser, positive_int


class Stage(Protocol):
    """One command, whose results go to a folder under `out`."""

    @property
    def name(self) -> str: ...

    @property
    def command(self) -> ModuleType: ...  # has a main(argv)

    def argv(self, out: Path, workers: int) -> list[str]: ...


def run_stages(
    argv: Sequence[str],
    stages: Sequence[Stage],
    *,
    module: str,
    about: str | None,
    out: str,
    prepare: Callable[[Path], None] | None = None,
) -> Path:
    """Parse the command line of a study; print and run the commands of its stages.

    Args:
        argv: prefixes of stage names (all stages without a prefix), --out and --workers.
        stages: all stages of the study.
        module: name of the study's module.
        about: help text.
        out: default of --out.
        prepare: function of --out that is called before the first stage.
    Returns:
        The value of --out.
    Raises:
        SystemExit: no stage begins with one of the prefixes.
    """
    parser = command_parser(module, about)
    names = ", ".join(stage.name for stage in stages)
    parser.add_argument("stages", nargs="*", help=f"prefixes of: {names}")
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--workers", type=positive_int, default=2, help="runs at a time")
    arguments = parser.parse_args(argv)
    prefixes = tuple(arguments.stages or [""])
    if lost := [each for each in prefixes if not any(s.name.startswith(each) for s in stages)]:
        parser.error(f"no stage begins with {', '.join(lost)}; there are {names}")
    chosen = [stage for stage in stages if stage.name.startswith(prefixes)]
    if prepare:
        prepare(arguments.out)
    for stage in chosen:
        words = stage.argv(arguments.out, arguments.workers)
        print(shlex.join(["python", "-m", stage.command.__name__, *words]), flush=True)
        stage.command.main(words)
    return arguments.out
