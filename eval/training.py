"""Runs of train.py inside this process, as `python train.py ...` would run it.

A worker has imported torch already: a run of ten seconds should not wait three for that.
"""

import contextlib
import runpy
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configurator import load_config
from eval.kept import PointError, of_the_model
from optim.statistics import settings_problems

ROOT = Path(__file__).parents[1]
DIVERGED = "steps in a row were not finite"  # what train.py says of a run that it gave up


def model_settings(command: list[str]) -> dict[str, Any]:
    """What makes the model of `python train.py ...`. ConfigError if it would refuse."""
    config, _ = load_config(command[1:], _dopr_problems)
    return of_the_model(asdict(config))


def train_in(folder: Path, command: list[str]) -> bool:
    """Run `python command...`, a run of train.py with this out_dir; false if it diverged.

    Raises PointError if it failed for another reason. What it printed is in train.log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "train.log"
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = _run_script(command)
    if code and DIVERGED not in log.read_text():
        raise PointError(f"{' '.join(command)}\nended with exit code {code}; see {log}")
    return code == 0


def _dopr_problems(settings: dict[str, Any]) -> list[str]:
    return settings_problems(settings) if settings["dopr"] else []


def _run_script(command: list[str]) -> int:
    """`python command...` in this process; its exit code."""
    argv, sys.argv = sys.argv, command
    try:
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    except SystemExit as exit:
        return int(exit.code or 0)
    finally:
        sys.argv = argv
    return 0
