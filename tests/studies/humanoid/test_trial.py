"""Test a study of clones: its records, commands, refusals, and the page of a report."""

import json
import shlex
import sys
from dataclasses import replace

import pytest

from eval.rollout.record import write_records
from eval.rollout.tasks import parse_task
from eval.rollout.tasks.task import TaskError
from studies.humanoid import trial
from studies.humanoid.grading import grade_policy
from studies.humanoid.task import Humanoid
from studies.humanoid.trial import HumanoidTrial, clone_of, main
from studies.report.__main__ import main as report
from studies.stats.errors import log_error
from studies.stats.records import RECORDS, read_records
from studies.sweep import compare
from studies.sweep.trial import run_trial
from studies.sweep.variants import parse_variant
from tests.studies.humanoid.small import SMALL, SPEC
from tests.studies.pages import read

pytestmark = pytest.mark.xdist_group("humanoid")  # its fixtures are slow

SETTINGS = {"optimizer": "adamw", "max_steps": 5}


def graded(**settings):
    """Return the grade of a clone as text, which is equal for equal numbers only."""
    clone = clone_of(SMALL, SETTINGS | settings, 1e-3, 0)
    return json.dumps(grade_policy(SMALL, clone, 2, 0).to_json())


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("humanoid") / "study"
    command = ["--task", SPEC, "--optimizers", "adamw,fast-dopr-adamw", "--steps", "5"]
    command += ["--seeds", "1", "--episodes", "2", "--out", str(out)]
    return compare.study_of(compare.parse(command)[1])


@pytest.fixture(scope="module")
def records(study):
    """Return the records of a study that runs in this process."""
    study.begin("python -m studies.sweep.compare")
    seed = study.seeds[0]
    trials = [
        *(study.trial(each, "fresh", 2e-3, seed) for each in study.variants),
        *(study.trial(each, "tuning", lr, 0) for each in study.variants for lr in (1e-3, 2e-3)),
        *study.references(),
    ]
    write_records(study.out / RECORDS, [run_trial(each) for each in trials])
    return read_records(study.out / RECORDS)


def test_a_run_depends_on_its_settings_alone():
    first = graded()
    assert graded() == first
    fast = graded(refresh_every=10, sigma_beta=0.95)
    assert len({first, fast, graded(refresh_every=10, sigma_beta=0.95, fresh_mean=True)}) == 3


def test_settings_of_a_variant_and_knobs_of_the_task_change_the_clone(study, tmp_path):
    names = ("adamw", "adamw+ema_decay=0.5", "adamw+embedding_lr=0.01", "dopr-adamw")
    variants = [HumanoidTrial.parse_variant(each) for each in names]
    trials = [replace(study, out=tmp_path).trial(each, "fresh", 2e-3, 0) for each in variants]
    knobs = {"whitening": 0.5, "label_noise": 0.5, "sigma_batch": "another", "batch_size": 64}
    for knob, value in knobs.items():
        other = replace(study, out=tmp_path / knob, task=replace(SMALL, **{knob: value}))
        trials.append(other.trial(variants[-1], "fresh", 2e-3, 0))
    found = [run_trial(each) for each in trials]
    assert len({each["val_loss"] for each in found}) == 8
    assert [each["tokens"] for each in found] == 7 * [5 * 128] + [5 * 64]
    assert trials[-1].first_rates("adamw") == HumanoidTrial.grids["adamw"]


def test_a_record_from_before_a_knob_existed_is_of_the_task_with_its_default():
    assert "noise=0.0" in SMALL.spec
    assert "label_noise" not in SMALL.spec
    assert "batch_size" not in SMALL.spec
    other = replace(SMALL, label_noise=0.5)
    assert other.spec == f"{SMALL.spec},label_noise=0.5"
    for task in (SMALL, other):
        assert parse_task(task.spec, {"humanoid": Humanoid}) == task


def test_the_records_of_a_study_have_positive_errors_and_the_references(study, records):
    by_name = {each["variant"]: each for each in records if each["role"] != "tuning"}
    assert by_name.keys() == {"adamw", "fast-dopr-adamw", "expert", "zero"}
    for name, record in by_name.items():
        metrics = record["grade"]["metrics"]
        assert record["val_loss"] == metrics["val_loss"]["mean"]
        smallest = 0.5 / 3  # half an episode of 2 + 1
        expected = max(metrics["shortfall"]["mean"], smallest)
        assert 2.718281828 ** log_error(record) == pytest.approx(expected), name
    assert by_name["adamw"]["tokens"] == 5 * 128
    sizes = [len(json.dumps(each)) for each in records]
    assert max(sizes) < 20_000


def test_a_finished_run_is_not_repeated(study, records, monkeypatch):
    monkeypatch.setattr(trial, "clone_of", None)
    own = study.trial(study.variants[1], "fresh", 2e-3, study.seeds[0])
    assert run_trial(own)["grade"] == records[1]["grade"]


def test_a_run_that_diverges_has_no_grade(study):
    own = study.trial(parse_variant("sgd"), "tuning", 1e6, 0)
    record = run_trial(own)
    assert record["val_loss"] is None
    assert record["grade"] is None


def test_the_report_shows_the_returns_and_the_survival(study, records, tmp_path):
    assert report([str(study.out), "--out", str(tmp_path)]) == 0
    page = read(tmp_path)
    for name in ("adamw", "fast-dopr-adamw", "expert, which was cloned"):
        assert page.row(name)
    assert "Ranked by return: higher is better" in " ".join(page.text.split())
    assert "1 − return / expert’s return" in page.text
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_the_command_of_a_record_repeats_its_run(study, records, capsys):
    own = study.trial(study.variants[1], "fresh", 2e-3, study.seeds[0])
    assert isinstance(own, HumanoidTrial)
    main(shlex.split(own.repeat_command)[4:])
    value = records[1]["grade"]["metrics"]["return"]["mean"]
    assert f"return {value!r} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "humanoid,expert=run"], "expert=run: must be one of walk-0"),
        (["--task", "humanoid,demonstration=1"], "did you mean 'demonstrations'"),
        (["--task", "humanoid,noise=-1,whitening=1"], "noise=-1.0: must be from 0 to 1; whitening"),
        (["--task", "humanoid", "--set", "n_head=2"], "task humanoid has no such settings"),
        (["--task", "humanoid", "--optimizers", "adamw+beta1=0.8"], "task humanoid has no"),
        (["--task", "humanoid", "--optimizers", "dopr-adamw+gamma=-1"], "gamma=-1"),
    ],
)
def test_a_wrong_command_is_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare.main(["--optimizers", "adamw", "--out", str(tmp_path / "study"), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("wrong", [["--lr", "0"], ["--optimizer", "adamm"], ["--episodes", "0"]])
def test_a_wrong_command_of_a_run_is_refused(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--optimizer", "adamw", "--lr", "0.01", *wrong])
    assert "error: " in capsys.readouterr().err


def test_without_the_simulator_the_task_is_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    monkeypatch.delitem(sys.modules, "studies.humanoid.simulator")
    with pytest.raises(TaskError, match=r"mujoco.*: pip install '\.\[humanoid\]'"):
        Humanoid()


def test_compare_names_the_commands_that_show_more_of_a_study_of_clones(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(compare, "compare", lambda study, workers: [])
    monkeypatch.setattr(compare, "summary", lambda records: "")
    for task, shown in ((SPEC, True), ("ctrl", False)):
        out = tmp_path / task.split(",")[0]
        compare.main(["--task", task, "--optimizers", "adamw", "--out", str(out)])
        printed = capsys.readouterr().out
        assert (f"python -m studies.humanoid.tables {out}\n" in printed) == shown
        assert ("python -m studies.humanoid.matched --out FILE\n" in printed) == shown
