"""One point of a comparison: train with these settings, grade, leave a record; never twice.

Points run in worker processes that have imported torch already: a run of ten seconds should not
wait three for that. What runs there is `train.py`, as `python train.py ...` would run it.
"""

import contextlib
import json
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from checkpoint import candidates
from configurator import load_config
from eval.lds import BATCH_SIZE, Lds, command_of, grade_policy, train_variant
from eval.record import make_record, train_command, write_record
from eval.reference import command_of as reference_command
from eval.reference import grade_reference
from eval.run import ENVIRONMENT
from eval.tasks import Task
from eval.tasks.task import OracleTask
from eval.ttf import grade_checkpoint, grading_code
from optim.statistics import settings_problems
from runlog import environment
from settings import FIELDS, RUN_ONLY

ROOT = Path(__file__).parents[1]
GRADING = "grading "  # how keys of `asked` begin that make the grade, not the model
DIVERGED = "steps in a row were not finite"  # what train.py says of a run that it gave up


class PointError(RuntimeError):
    """A run that failed for another reason than divergence, or is not the one asked for."""


@dataclass(frozen=True)
class Point:
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
        grading = {"n": self.n, "seed": self.grading_seed, "code": grading_code(self.task)}
        return self._trained() | {GRADING + key: value for key, value in grading.items()}

    def _trained(self) -> dict[str, Any]:
        """What makes the model."""
        if self.role == "reference":
            return {"spec": self.task.spec}
        if isinstance(self.task, Lds):
            load_config([*self.command[1:], "--warmup_steps=0"], _dopr_problems)  # it has none
            return {**self.settings, "lr": self.lr, "seed": self.seed, "spec": self.task.spec}
        return trained(self.command)


def trained(command: list[str]) -> dict[str, Any]:
    """What makes the model of `python train.py ...`. ConfigError if it would refuse."""
    config, _ = load_config(command[1:], _dopr_problems)
    return _of_the_model(asdict(config))


def _dopr_problems(settings: dict[str, Any]) -> list[str]:
    return settings_problems(settings) if settings["dopr"] else []


def _of_the_model(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in RUN_ONLY}


def run_point(point: Point) -> dict[str, Any]:
    """The record of a point; from disk if it was finished before.

    A model that was trained before and graded otherwise, or by other code, is only graded again.
    Raises PointError: why it failed, or how what is on disk differs from what is asked.
    """
    names = {"variant": point.variant, "base": point.base, "role": point.role}
    record = recorded(point.folder, point.asked(), lambda: _graded(point) | names)
    if record["role"] != point.role:  # a control may become the rate that is reported
        write_record(point.folder / "record.json", record | names)
    return record | names


def recorded(
    folder: Path, asked: dict[str, Any], make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The record in a folder, which `make` makes unless it is there.

    Raises PointError if what is there was trained with other settings than `asked`.
    """
    if found := finished(folder, asked):
        return found
    started = time.perf_counter()
    record = make() | {"asked": asked}
    record["seconds"] = time.perf_counter() - started
    write_record(folder / "record.json", record)
    return read_record(folder)


def finished(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The record in a folder; None if there is none, or if its model is to be graded again.

    Raises PointError if it, or a run that was stopped there, is another than that asked for.
    """
    asked = json.loads(json.dumps(asked))
    record = read_record(folder) if (folder / "record.json").exists() else None
    other = differences(record["asked"] if record else _begun(folder) or asked, asked)
    _check_trained_the_same(folder, other)
    return None if other else record


def _graded(point: Point) -> dict[str, Any]:
    """The record of a model that is trained now, or of one that needs no training."""
    task = point.task
    if point.role == "reference" and isinstance(task, OracleTask | Lds):
        return _reference_record(point, task)
    return _policy_record(point, task) if isinstance(task, Lds) else _train_and_grade(point, task)


def read_record(folder: Path) -> dict[str, Any]:
    """What a finished point left."""
    return json.loads((folder / "record.json").read_text())


def _begun(folder: Path) -> dict[str, Any]:
    """What makes the model that train.py began in a folder; empty if there is none."""
    path = folder / "config.json"
    return _of_the_model(json.loads(path.read_text())) if path.exists() else {}


def differences(found: dict[str, Any], asked: dict[str, Any]) -> dict[str, str]:
    """What was asked of a run on disk and is not asked now, or not so: {key: "was .., is .."}.

    A setting that one side does not have, because train.py had none of it then, has its default.
    """
    default = {key: field.default for key, field in FIELDS.items()}
    pairs = {
        key: (found.get(key, default.get(key)), asked.get(key, default.get(key)))
        for key in sorted(found.keys() | asked.keys())
    }
    return {key: f"was {was}, is {now}" for key, (was, now) in pairs.items() if was != now}


def _check_trained_the_same(folder: Path, other: dict[str, str]) -> None:
    """PointError if the differences of what is in a folder are not of its grading only."""
    trained = [f"{key} {change}" for key, change in other.items() if not key.startswith(GRADING)]
    if trained:
        was = "; ".join(trained)
        raise PointError(f"{folder} holds another run: {was}; delete it or choose another --out")


def _train_and_grade(point: Point, task: Task) -> dict[str, Any]:
    """A run of train.py, graded on rollouts."""
    if _is_trained(point.folder):
        return grade_checkpoint(point.folder, n=point.n, seed=point.grading_seed)
    if train_in(point.folder, point.command):
        return grade_checkpoint(point.folder, n=point.n, seed=point.grading_seed)
    return _diverged(point, task)


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


def _is_trained(folder: Path) -> bool:
    """Whether its model is there, from a time when it was graded otherwise."""
    finished = (folder / "record.json").exists() and read_record(folder)["grade"] is not None
    return finished and bool(candidates(folder / "checkpoints"))


def _diverged(point: Point, task: Task) -> dict[str, Any]:
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


def _policy_record(point: Point, lds: Lds) -> dict[str, Any]:
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


def _reference_record(point: Point, task: OracleTask | Lds) -> dict[str, Any]:
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


def start_worker(parent: Connection) -> None:
    """For a worker: one thread for a point; it ends when the other end of `parent` is closed.

    That happens at the latest when the parent is killed. Ctrl-C is for the parent to answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()


def _end_with(parent: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        parent.recv()
    os._exit(1)
