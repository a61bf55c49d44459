"""Runs of train.py inside this process, as `python train.py ...` would run it.

A worker has imported torch already: a run of ten seconds should not wait three for that.
"""

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import train
from optim.dopr.layer import settings_problems
from studies.sweep.run_cache import TrialError, of_the_model
from trainer.config import load_config


def model_settings(command: list[str]) -> dict[str, Any]:
    """What makes the model of `python train.py ...`. ConfigError if it would refuse."""
    config, _ = load_config(command[1:], _dopr_problems)
    return of_the_model(asdict(config))


def train_in(folder: Path, command: list[str]) -> bool:
    """Run `python command...`, a run of train.py with this out_dir; false if it diverged.

    Raises TrialError if it failed for another reason. What it printed is in train.log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "train.log"
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            code = train.run(command[1:])
        except train.TrainingDiverged as error:
            print(f"error: {error}")
            return False
        except train.USER_ERRORS as error:
            print(f"error: {error}")
            raise TrialError(f"{' '.join(command)}\nfailed: {error}; see {log}") from error
    if code:
        raise TrialError(f"{' '.join(command)}\nended with exit code {code}; see {log}")
    return True


def _dopr_problems(settings: dict[str, Any]) -> list[str]:
    return settings_problems(settings) if settings["dopr"] else []
