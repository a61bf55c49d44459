"""Test that a study treats all tasks alike, and that train.py refuses those without tokens."""

from pathlib import Path

import pytest

from eval.rollout.tasks import POLICY_TASKS, TASKS, TaskError, open_data, parse_task
from studies.sweep.tasks import STUDY_TASKS, trial_type
from studies.sweep.trial import run_folder


def task_of(name):
    if name == "humanoid":
        pytest.importorskip("mujoco")
    return parse_task(name, STUDY_TASKS)


@pytest.mark.parametrize("name", STUDY_TASKS)
def test_a_trial_of_every_task_has_settings_that_determine_its_record(name):
    task = task_of(name)
    kind = trial_type(task)
    variant = kind.parse_variant("fast-dopr-adamw")
    trial = kind(
        folder=run_folder(Path("out"), variant.name, 1e-3, 0),
        task=task,
        variant=variant.name,
        base=variant.base,
        role="tuning",
        lr=kind.first_rates("adamw")[0],
        seed=0,
        settings={"max_steps": 10} | kind.sizes(task, 10, 1024) | dict(variant.settings),
        n=task.default_episodes,
    )
    asked = trial.asked()
    assert asked["sigma_beta"] == 0.95
    assert asked["grading n"] == task.default_episodes


@pytest.mark.parametrize("name", POLICY_TASKS)
def test_a_task_without_tokens_is_no_dataset(name):
    with pytest.raises(TaskError, match=f"python -m studies.sweep.compare --task {name}"):
        open_data(f"task:{name}")


def test_the_tasks_without_tokens_are_those_that_train_py_does_not_train():
    assert {*POLICY_TASKS} == STUDY_TASKS.keys() - TASKS.keys()
