"""Look up the tasks of the benchmark by name; open `task:NAME,knob=value,...` as a dataset.

train.py trains on these tasks, whose models read and write tokens. studies/sweep/tasks.py adds the
tasks without tokens.
"""

import difflib
from dataclasses import fields
from typing import Any

from data.dataset import Dataset, open_dataset
from eval.rollout.tasks.chain import Chain
from eval.rollout.tasks.ctrl import Ctrl
from eval.rollout.tasks.nav import Nav
from eval.rollout.tasks.pdfa import Pdfa
from eval.rollout.tasks.pystdlib import PyStdlib, TextTask
from eval.rollout.tasks.task import Task, TaskError

__all__ = ["TASKS", "Task", "TaskError", "open_data", "parse_task", "task_of"]

TASKS: dict[str, type[Task]] = {task.name: task for task in (Pdfa, Ctrl, Nav, PyStdlib, Chain)}
POLICY_TASKS = ("lds", "humanoid")  # of studies/sweep/tasks.py; they have no tokens
PREFIX = "task:"


def open_data(dataset: str) -> Dataset:
    """Open the dataset of a task, or any other dataset with `data.dataset.open_dataset`."""
    return parse_task(dataset).open() if dataset.startswith(PREFIX) else open_dataset(dataset)


def task_of(dataset: str) -> Task:
    """Return the task that grades models trained on `dataset`. Any text dataset has one."""
    if dataset.startswith(PREFIX):
        return parse_task(dataset)
    return PyStdlib() if dataset == PyStdlib.name else TextTask(dataset=dataset)


def parse_task(spec: str, tasks: dict[str, Any] = TASKS) -> Any:
    """Build the task of a spec `task:NAME,knob=value,...`, in which "task:" is optional.

    Raises:
        TaskError: the name or a knob is unknown, a value has the wrong type or is out of range, or
            the task is none of `tasks` because it has no tokens.
    """
    name, *settings = spec.removeprefix(PREFIX).split(",")
    if name in POLICY_TASKS and tasks is TASKS:
        raise TaskError(
            f"task {name} has no tokens, so train.py cannot train on it; use `python -m "
            f"studies.sweep.compare --task {name} --optimizers adamw,dopr-adamw`"
        )
    if name not in tasks:
        raise TaskError(
            f"unknown task {name!r}{_hint(name, tasks)}; choose from {', '.join(tasks)}"
        )
    types = {field.name: type(field.default) for field in fields(tasks[name])}
    knobs = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        if key not in types:
            raise TaskError(
                f"task {name}: unknown knob {key!r}{_hint(key, types)}; "
                f"choose from {', '.join(types)}"
            )
        if key in knobs:
            raise TaskError(f"task {name}: {key} is given more than once")
        try:
            knobs[key] = types[key](text)
        except ValueError:
            raise TaskError(
                f"task {name}: {key}={text!r} must be of type {types[key].__name__}"
            ) from None
    return tasks[name](**knobs)


def _hint(word: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
