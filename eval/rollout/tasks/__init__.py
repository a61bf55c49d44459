"""The tasks of the benchmark by name, and `task:NAME,knob=value` as the name of a dataset."""

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
PREFIX = "task:"


def open_data(dataset: str) -> Dataset:
    """The dataset of a task, or any other that `data.dataset.open_dataset` knows."""
    return parse_task(dataset).open() if dataset.startswith(PREFIX) else open_dataset(dataset)


def task_of(dataset: str) -> Task:
    """The task that grades models trained on a dataset; text of any kind has one, too."""
    if dataset.startswith(PREFIX):
        return parse_task(dataset)
    return PyStdlib() if dataset == PyStdlib.name else TextTask(dataset=dataset)


def parse_task(spec: str, tasks: dict[str, Any] = TASKS) -> Any:
    """The task of `tasks` that `task:NAME,knob=value,...` names; "task:" may be left out.

    Raises TaskError on an unknown name or knob, or a value that does not fit.
    """
    name, *settings = spec.removeprefix(PREFIX).split(",")
    if name not in tasks:
        raise TaskError(f"task {name!r}: unknown{_hint(name, tasks)}; tasks: {', '.join(tasks)}")
    kinds = {field.name: type(field.default) for field in fields(tasks[name])}
    knobs = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        if key not in kinds:
            raise TaskError(
                f"task {name}: unknown knob {key!r}{_hint(key, kinds)}; knobs: {', '.join(kinds)}"
            )
        try:
            knobs[key] = kinds[key](text)
        except ValueError:
            wanted = kinds[key].__name__
            raise TaskError(f"task {name}: {key}={text!r} is not of type {wanted}") from None
    return tasks[name](**knobs)


def _hint(word: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
