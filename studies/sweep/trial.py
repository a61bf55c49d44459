"""Make one run of a comparison: train a model, grade it, and store its record; never twice.

Runs of train.py happen inside this process: a worker has imported torch already, and a run of ten
seconds should not wait three seconds for another import.
"""

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import train
from eval.rollout.record import make_record, train_command, write_record
from eval.rollout.tasks.task import TaskBase
from eval.rollout.ttf import grade_checkpoint, grading_version
from eval.run import ENVIRONMENT
from optim.dopr.settings import settings_problems
from optim.third_party import default_lr
from studies.sweep.run_cache import (
    GRADING,
    TrialError,
    model_only,
    read_record,
    read_settings,
    recorded,
)
from studies.sweep.variants import STUDY_SETTINGS, parse_changes, parse_variant
from trainer.checkpoint.read import candidates
from trainer.config import load_config
from trainer.optimizers import optimizer_problems

GRIDS = {  # the first learning rates of a sweep
    "adamw": (2e-3, 4e-3, 8e-3),
    "sgd": (0.1, 0.2, 0.4),
    "signum": (5e-4, 1e-3, 2e-3),
    "muon": (8e-3, 1.6e-2, 3.2e-2),
    "adamuon": (8e-3, 1.6e-2, 3.2e-2),
}


@dataclass(frozen=True)
class Trial(ABC):
    """A model to train and grade.

    A subclass describes one way to obtain the model. `settings` are settings of train.py, on top of
    the config file of the studies.
    """

    folder: Path
    task: Any  # TaskBase
    variant: str
    base: str
    role: str  # tuning | fresh | control | reference
    lr: float  # 0 for a reference
    seed: int
    settings: dict[str, Any]
    n: int  # episodes
    grading_seed: int = 0

    grids: ClassVar[dict[str, tuple[float, ...]]] = GRIDS
    has_aux_lr: ClassVar[bool] = False  # whether matrix optimizers train beside an AdamW
    further_commands: ClassVar[dict[str, str]] = {}  # {what it shows of a study in {out}: command}

    @abstractmethod
    def model_identity(self) -> dict[str, Any]:
        """Return the settings that determine the model. Raises ConfigError if they are invalid."""

    @classmethod
    def first_rates(cls, optimizer: str) -> tuple[float, ...]:
        """Return the learning rates that a sweep begins with.

        Those of a class that has no grid here are its own default and a factor of 2 around it.
        """
        if optimizer in cls.grids:
            return cls.grids[optimizer]
        lr = default_lr(optimizer)
        return lr / 2, lr, 2 * lr

    @abstractmethod
    def make(self) -> dict[str, Any]:
        """Train the model, grade it, and return its record."""

    @property
    def command(self) -> list[str]:
        """The words of the command that trains the model, without the interpreter."""
        changes = {**self.settings, "lr": self.lr, "seed": self.seed}
        changes |= {"dataset": self.task.spec, "out_dir": self.folder}
        return ["train.py", "config/ttf.py", *(f"--{k}={v}" for k, v in changes.items())]

    def asked(self) -> dict[str, Any]:
        """Return every setting that determines the record. Raises ConfigError if one is invalid."""
        grading = {"n": self.n, "seed": self.grading_seed, "code": grading_version(self.task)}
        return self.model_identity() | {GRADING + key: value for key, value in grading.items()}


def run_folder(out: Path, variant: str, lr: float, seed: int) -> Path:
    """Return the folder of one run of the study in `out`."""
    return out / "runs" / f"{variant}-lr{lr:g}-seed{seed}"


def run_trial(trial: Trial) -> dict[str, Any]:
    """Return the record of a trial, from disk if it was finished before.

    A model that was trained before, but graded on other episodes or by other code, is only graded
    again. Raises TrialError if the run fails or if its folder contains another run.
    """
    names = {"variant": trial.variant, "base": trial.base, "role": trial.role}
    record = recorded(trial.folder, trial.asked(), lambda: trial.make() | names)
    if record["role"] != trial.role:  # the rate of a control may become the rate that is reported
        write_record(trial.folder / "record.json", record | names)
    return record | names


class TrainTrial(Trial):
    """A transformer that train.py trains, graded on its rollouts."""

    has_aux_lr: ClassVar[bool] = True

    parse_variant = staticmethod(parse_variant)

    @staticmethod
    def parse_changes(pairs: Iterable[str]) -> dict[str, str]:
        """Return the settings of --set. Raises ValueError if one is unknown or fixed here."""
        return parse_changes(pairs, STUDY_SETTINGS | {"block_size"})  # an episode sets block_size

    @staticmethod
    def sizes(task: Any, steps: int, tokens_per_step: int) -> dict[str, Any]:
        """Return the settings of train.py that follow from the sizes of the task and of the run."""
        documents = max(1, round(tokens_per_step / task.context_tokens))
        sizes = {"block_size": task.context_tokens, "batch_size": documents}
        sizes["micro_batch_size"] = documents
        return sizes | {"warmup_steps": steps // 10, "eval_every": steps}

    def model_identity(self) -> dict[str, Any]:
        return model_settings(self.command)

    def make(self) -> dict[str, Any]:
        if _is_trained(self.folder) or train_in(self.folder, self.command):
            return grade_checkpoint(self.folder, n=self.n, seed=self.grading_seed)
        return _diverged(self.folder, self.task)


def _is_trained(folder: Path) -> bool:
    """Whether the folder contains the model of a run that was graded in another way."""
    finished = (folder / "record.json").exists() and read_record(folder)["grade"] is not None
    return finished and bool(candidates(folder / "checkpoints"))


def _diverged(folder: Path, task: TaskBase) -> dict[str, Any]:
    """Return the record of a run that diverged: it has neither a loss nor a grade."""
    settings = read_settings(folder)
    started = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    return make_record(
        task,
        settings,
        steps=settings["max_steps"],
        val_loss=None,
        grade=None,
        command=train_command(settings, started["threads"]),
        environment={key: started[key] for key in ENVIRONMENT},
    )


def model_settings(command: list[str]) -> dict[str, Any]:
    """Return the settings that determine the model of `python train.py ...`.

    Raises ConfigError if train.py would refuse the command.
    """

    def problems(settings: dict[str, Any]) -> list[str]:
        of_dopr = settings_problems(settings) if settings["dopr"] else []
        return optimizer_problems(settings) + of_dopr

    config, _ = load_config(command[1:], problems)
    return model_only(asdict(config))


def train_in(folder: Path, command: list[str]) -> bool:
    """Run `python train.py ...` with out_dir=`folder`; return False if the run diverged.

    The output goes to train.log. Raises TrialError if the run fails for another reason.
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
