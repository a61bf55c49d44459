"""Test that a study treats all tasks alike, and that train.py refuses those without tokens."""

import json
from pathlib import Path

import pytest

from eval.rollout.tasks import POLICY_TASKS, TASKS, TaskError, open_data, parse_task
from studies.sweep.lds import LdsTrial
from studies.sweep.optimizers import default_settings
from studies.sweep.run_cache import differences
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


@pytest.mark.parametrize(("optimizer", "is_other"), [("muon", True), ("adamw", False)])
def test_runs_of_muon_from_before_it_had_a_dtype_are_other_runs(optimizer, is_other):
    """They were made in bfloat16, and the default on a CPU is float32."""
    variant = LdsTrial.parse_variant(optimizer)
    settings = {"max_steps": 5} | dict(variant.settings)
    task = parse_task("lds", STUDY_TASKS)
    trial = LdsTrial(Path("out"), task, optimizer, optimizer, "fresh", 0.1, 200, settings, n=1)
    new = json.loads(json.dumps(trial.asked()))
    old = {key: new[key] for key in new.keys() - default_settings(optimizer, False).keys()}
    assert old.keys() < new.keys()
    assert bool(differences(old, new)) == is_other
    assert not differences(new, new)
