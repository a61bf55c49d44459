"""One point of a comparison: train with these settings, grade, leave a record; never twice."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.rollout.record import make_record, train_command, write_record
from eval.rollout.tasks import Task
from eval.rollout.tasks.lds import Lds, grade_policy
from eval.rollout.tasks.task import OracleTask
from eval.rollout.ttf import grade_checkpoint, grading_version
from eval.run import ENVIRONMENT
from studies.sweep.lds import BATCH_SIZE, command_of, train_variant
from studies.sweep.reference import command_of as reference_command
from studies.sweep.reference import grade_reference
from studies.sweep.run_cache import GRADING, read_record, recorded
from studies.sweep.training import model_settings, train_in
from trainer.checkpoint.read import candidates
from trainer.metrics import environment


@dataclass(frozen=True)
class Trial:
    """What is trained and graded. `settings` are train.py's, on top of the study's config file."""

    folder: Path
    task: Task | Lds
    variant: str
    base: str
    role: str  # tuning | fresh | control | reference
    lr: float  # 0 for a reference
    seed: int
    settings: dict[str, Any]
    n: int  # episodes
    grading_seed: int = 0

    @property
    def command(self) -> list[str]:
        changes = {**self.settings, "lr": self.lr, "seed": self.seed}
        changes |= {"dataset": self.task.spec, "out_dir": self.folder}
        return ["train.py", "config/ttf.py", *(f"--{k}={v}" for k, v in changes.items())]

    def asked(self) -> dict[str, Any]:
        """Every number that makes the record what it is. ConfigError if train.py would refuse."""
        grading = {"n": self.n, "seed": self.grading_seed, "code": grading_version(self.task)}
        return self._trained() | {GRADING + key: value for key, value in grading.items()}

    def _trained(self) -> dict[str, Any]:
        """What makes the model."""
        if self.role == "reference":
            return {"spec": self.task.spec}
        if isinstance(self.task, Lds):
            model_settings([*self.command, "--warmup_steps=0"])  # it has none
            return {**self.settings, "lr": self.lr, "seed": self.seed, "spec": self.task.spec}
        return model_settings(self.command)


def run_trial(point: Trial) -> dict[str, Any]:
    """The record of a point; from disk if it was finished before.

    A model that was trained before and graded otherwise, or by other code, is only graded again.
    Raises PointError: why it failed, or how what is on disk differs from what is asked.
    """
    names = {"variant": point.variant, "base": point.base, "role": point.role}
    record = recorded(point.folder, point.asked(), lambda: _graded(point) | names)
    if record["role"] != point.role:  # a control may become the rate that is reported
        write_record(point.folder / "record.json", record | names)
    return record | names


def _graded(point: Trial) -> dict[str, Any]:
    """The record of a model that is trained now, or of one that needs no training."""
    task = point.task
    if point.role == "reference" and isinstance(task, OracleTask | Lds):
        return _reference_record(point, task)
    return _policy_record(point, task) if isinstance(task, Lds) else _train_and_grade(point, task)


def _train_and_grade(point: Trial, task: Task) -> dict[str, Any]:
    """A run of train.py, graded on rollouts."""
    if _is_trained(point.folder):
        return grade_checkpoint(point.folder, n=point.n, seed=point.grading_seed)
    if train_in(point.folder, point.command):
        return grade_checkpoint(point.folder, n=point.n, seed=point.grading_seed)
    return _diverged(point, task)


def _is_trained(folder: Path) -> bool:
    """Whether its model is there, from a time when it was graded otherwise."""
    finished = (folder / "record.json").exists() and read_record(folder)["grade"] is not None
    return finished and bool(candidates(folder / "checkpoints"))


def _diverged(point: Trial, task: Task) -> dict[str, Any]:
    """The record of a run that has neither loss nor rollouts."""
    settings = json.loads((point.folder / "config.json").read_text())
    started = json.loads((point.folder / "metrics.jsonl").read_text().splitlines()[0])
    return make_record(
        task,
        settings,
        steps=settings["max_steps"],
        val_loss=None,
        grade=None,
        command=train_command(settings, started["threads"]),
        environment={key: started[key] for key in ENVIRONMENT},
    )


def _policy_record(point: Trial, lds: Lds) -> dict[str, Any]:
    """A linear policy trained and graded in closed form, without train.py."""
    steps = point.settings["max_steps"]
    grade = grade_policy(lds, train_variant(lds, point.settings, point.lr, point.seed, steps))
    settings = point.settings | {"lr": point.lr, "seed": point.seed}
    settings |= {"batch_size": BATCH_SIZE, "block_size": 1}
    return make_record(
        lds,
        settings,
        steps=steps,
        val_loss=grade.metrics["val_loss"].mean,
        grade=grade.to_json(),
        command=command_of(lds, point.variant, point.lr, point.seed, steps),
        environment=environment(torch.device("cpu")),
    )


def _reference_record(point: Trial, task: OracleTask | Lds) -> dict[str, Any]:
    """A row without an optimizer: what is possible, or what is worth nothing."""
    grade = grade_reference(task, point.variant, n=point.n, seed=point.grading_seed)
    sizes = {"batch_size": 0, "block_size": 0}
    loss = grade.metrics["val_loss" if isinstance(task, Lds) else "val_ce"].mean
    return make_record(
        task,
        {"optimizer": point.base, "dopr": False, "lr": 0.0, "seed": point.seed, **sizes},
        steps=point.settings["max_steps"],
        val_loss=loss,
        grade=grade.to_json() | {"samples": []},
        command=reference_command(task.spec, n=point.n, seed=point.grading_seed),
        environment=environment(torch.device("cpu")),
    )
