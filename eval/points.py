"""One point of a comparison: train with these settings, grade, leave a record; never twice.

Points run in worker processes that have imported torch already: a run of ten seconds should not
wait three for that. What runs there is `train.py`, as `python train.py ...` would run it.
"""

import contextlib
import json
import runpy
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.lds import BATCH_SIZE, Lds, grade_policy, train_policy
from eval.record import make_record, write_record
from eval.run import ENVIRONMENT
from eval.tasks import Task
from eval.ttf import grade_checkpoint
from runlog import environment

ROOT = Path(__file__).parents[1]
DIVERGED = "steps in a row were not finite"  # what train.py says of a run that it gave up
DOPR_NUMBERS = {"gamma", "sigma_beta", "refresh_every", "collect_every", "exponent"}


class PointError(RuntimeError):
    """A run that failed for another reason than divergence."""


@dataclass(frozen=True)
class Point:
    """What is trained and graded. `settings` are train.py's, on top of the study's config file."""

    folder: Path
    task: Task | Lds
    variant: str
    base: str
    role: str  # tuning | fresh
    lr: float
    seed: int
    settings: dict[str, Any]
    n: int  # episodes
    grading_seed: int = 0

    @property
    def command(self) -> list[str]:
        changes = {**self.settings, "lr": f"{self.lr:g}", "seed": self.seed}
        changes |= {"dataset": self.task.spec, "out_dir": self.folder}
        return ["train.py", "config/ttf.py", *(f"--{k}={v}" for k, v in changes.items())]


def run_point(point: Point) -> dict[str, Any]:
    """The record of a point; from disk if it was finished before. PointError says why it failed."""
    path = point.folder / "record.json"
    if path.exists():
        return json.loads(path.read_text())
    started = time.perf_counter()
    task = point.task
    record = _imitate(point, task) if isinstance(task, Lds) else _train_and_grade(point, task)
    record |= {"variant": point.variant, "base": point.base, "role": point.role}
    record["seconds"] = time.perf_counter() - started
    write_record(path, record)
    return json.loads(path.read_text())


def _train_and_grade(point: Point, task: Task) -> dict[str, Any]:
    """A run of train.py, graded on rollouts."""
    point.folder.mkdir(parents=True, exist_ok=True)
    log = point.folder / "train.log"
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = _run_script(point.command)
    if code == 0:
        return grade_checkpoint(point.folder, n=point.n, seed=point.grading_seed)
    if DIVERGED not in log.read_text():
        raise PointError(f"{' '.join(point.command)}\nended with exit code {code}; see {log}")
    return _diverged(point, task)


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
        command=" ".join(["python", *point.command]),
        environment={key: started[key] for key in ENVIRONMENT},
    )


def _imitate(point: Point, lds: Lds) -> dict[str, Any]:
    """A linear policy trained and graded in closed form, without train.py."""
    settings = point.settings
    given = {key: settings[key] for key in DOPR_NUMBERS & settings.keys()}
    dopr = given if settings["dopr"] else {}
    unknown = settings.keys() - DOPR_NUMBERS - {"optimizer", "dopr", "max_steps"}
    if unknown:
        raise PointError(f"{point.variant}: task lds has no setting {', '.join(sorted(unknown))}")
    steps = settings["max_steps"]
    K = train_policy(lds, settings["optimizer"], point.lr, point.seed, steps, **dopr)
    grade = grade_policy(lds, K)
    settings = settings | {"lr": point.lr, "seed": point.seed}
    settings |= {"batch_size": BATCH_SIZE, "block_size": 1}
    return make_record(
        lds,
        settings,
        steps=steps,
        val_loss=grade.metrics["val_loss"].mean,
        grade=grade.to_json(),
        command=f"python -m eval.compare --task lds --steps {steps} --optimizers {point.variant}",
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


def one_thread() -> None:
    """For a worker: points run side by side, a thread each."""
    torch.set_num_threads(1)
