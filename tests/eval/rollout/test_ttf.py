"""Test grading from the command line and during training."""

import builtins
import inspect
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from eval.rollout import ttf
from eval.rollout.record import write_record
from eval.rollout.tasks import TaskError, task_of
from eval.rollout.tasks.pdfa import Pdfa
from studies.stats.records import load_records
from tests.tiny import argv, metrics

pytestmark = pytest.mark.xdist_group("ttf")  # its fixtures are slow

PDFA = "task:pdfa,states=4,alphabet=4,horizon=8,n_documents=64"
SIZES = {"block_size": 8, "max_steps": 4, "eval_every": 4, "save_every": 2, "warmup_steps": 1}


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """Train a run on a task and grade it every other step."""
    out = tmp_path_factory.mktemp("graded") / "run"
    assert train.main(argv(PDFA, out, **SIZES, ttf_every=2, ttf_episodes=8)) == 0
    return out


def grade(capsys, *arguments):
    ttf.main([*map(str, arguments), "--episodes", "16"])
    return capsys.readouterr().out


def test_training_records_what_rollouts_cost(graded):
    rows = metrics(graded, "ttf")
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert all(row["jeffreys"] > 0 for row in rows)


def test_averaged_weights_are_graded_beside_the_weights_as_the_command_does(tmp_path, capsys):
    settings = SIZES | {"ttf_every": 4, "ttf_episodes": 8, "ema_decay": 0.9}
    assert train.main(argv(PDFA, tmp_path / "run", **settings)) == 0
    first, last = metrics(tmp_path / "run", "ttf")
    assert first["ema_jeffreys"] == first["jeffreys"]
    assert last["ema_jeffreys"] > last["jeffreys"]  # the average lags behind
    ttf.main([str(tmp_path / "run"), "--episodes", "8", "--ema", "--device", "cpu"])
    assert f"jeffreys {last['ema_jeffreys']:.4f}" in capsys.readouterr().out


def test_grading_while_training_changes_no_weight(graded, tmp_path):
    assert train.main(argv(PDFA, tmp_path / "plain", **SIZES)) == 0
    name = "checkpoints/step-00000004/model.safetensors"
    assert (graded / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_record_says_everything_and_is_not_computed_twice(graded, capsys):
    line = grade(capsys, graded)
    (path,) = (graded / "ttf").glob("step-00000004.json")
    record = json.loads(path.read_text())
    mean = record["grade"]["metrics"]["jeffreys"]["mean"]
    assert f"jeffreys {mean:.4f}" in line
    assert record["val_loss"] == metrics(graded, "val")[-1]["loss"]
    assert (record["task"], record["variant"], record["steps"]) == ("pdfa", "adamw", 4)
    record["grade"]["metrics"]["jeffreys"]["mean"] = -1.0
    write_record(path, record)
    assert "jeffreys -1.0000" in grade(capsys, graded)  # read, not computed
    ttf.main([str(graded), "--episodes", "8"])  # other settings need another grade
    assert "-1.0000" not in capsys.readouterr().out


def test_a_metric_that_is_not_finite_is_read_back(graded, tmp_path, capsys):
    run = shutil.copytree(graded, tmp_path / "run")
    grade(capsys, run)
    path = run / "ttf/step-00000004.json"
    record = json.loads(path.read_text())
    record["grade"]["metrics"]["jeffreys"]["mean"] = float("inf")
    write_record(path, record)  # as null
    assert "jeffreys n/a [" in grade(capsys, run)


@pytest.mark.parametrize("content", ["", "[]", '{"grading": {}}'])
def test_a_damaged_record_is_named_with_what_to_do(graded, tmp_path, capsys, content):
    run = shutil.copytree(graded, tmp_path / "run")
    (run / "ttf").mkdir(exist_ok=True)
    (run / "ttf/step-00000004.json").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        grade(capsys, run)
    error = capsys.readouterr().err
    assert "step-00000004.json: " in error
    assert "delete the file" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [("ttf", "", "ttf is not a folder"), ("metrics.jsonl", "[1]\n", "metrics.jsonl, line 1")],
)
def test_what_a_grade_needs_beside_the_model_is_checked_before_the_grading(
    graded, tmp_path, capsys, monkeypatch, file, content, message
):
    run = shutil.copytree(graded, tmp_path / "run", ignore=shutil.ignore_patterns("ttf"))
    (run / file).write_text(content)
    monkeypatch.setattr(ttf, "grade_model", lambda *args, **rest: pytest.fail("graded"))
    with pytest.raises(SystemExit, match="2"):
        grade(capsys, run)
    assert message in capsys.readouterr().err


def test_a_replaced_checkpoint_is_graded_again(graded, tmp_path, capsys):
    run = shutil.copytree(graded, tmp_path / "run")
    grade(capsys, run)
    path = run / "ttf/step-00000004.json"
    before = json.loads(path.read_text())
    other = tmp_path / "other"
    assert train.main(argv(PDFA, other, **SIZES, seed=1)) == 0
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(other / "checkpoints", run / "checkpoints")
    grade(capsys, run)
    after = json.loads(path.read_text())
    assert after["seed"] == 1
    assert after["grade"]["metrics"] != before["grade"]["metrics"]


def test_a_run_without_metrics_is_graded(graded, tmp_path, capsys):
    shutil.copytree(graded / "checkpoints", tmp_path / "checkpoints")  # as eval.convert writes
    assert "val loss n/a" in grade(capsys, tmp_path)


def test_a_line_of_the_metrics_that_a_kill_cut_is_skipped(graded, tmp_path, capsys):
    run = shutil.copytree(graded, tmp_path / "run", ignore=shutil.ignore_patterns("ttf"))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "val", "st')
    assert f"val loss {metrics(graded, 'val')[-1]['loss']:.4f}" in grade(capsys, run)


@pytest.mark.parametrize(
    ("parent", "target"), [("checkpoints", "ttf"), ("copies", "copies/step-00000004/ttf")]
)
def test_a_checkpoint_given_by_a_relative_path_is_graded_in_its_run_or_in_itself(
    graded, tmp_path, capsys, monkeypatch, parent, target
):
    shutil.copytree(graded / "checkpoints", tmp_path / parent)
    monkeypatch.chdir(tmp_path / parent)
    for _ in range(2):  # the grade is no damage to the checkpoint
        grade(capsys, "step-00000004")
    assert [*tmp_path.rglob("step-*.json")] == [tmp_path / target / "step-00000004.json"]


@pytest.mark.parametrize(("owner", "name"), [(ttf, "GRADING_VERSION"), (Pdfa, "grading_version")])
def test_a_raised_version_grades_again(graded, tmp_path, capsys, monkeypatch, owner, name):
    run = shutil.copytree(graded, tmp_path / "run")
    grade(capsys, run)
    path = run / "ttf/step-00000004.json"
    write_record(path, json.loads(path.read_text()) | {"val_loss": -1.0})
    assert "val loss -1.0000" in grade(capsys, run)
    monkeypatch.setattr(owner, name, getattr(owner, name) + 1)
    assert "val loss -1.0000" not in grade(capsys, run)


def test_the_versions_of_grades_and_documents_read_no_source(monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError(f"{args} was read")

    task = task_of(PDFA)
    expected = ttf.grading_version(task), task._fingerprint()
    with monkeypatch.context() as patch:
        for owner, name in ((builtins, "open"), (io, "open"), (os, "open")):
            patch.setattr(owner, name, read)
        patch.setattr(inspect, "getsource", read)
        found = ttf.grading_version(task), task._fingerprint()
    assert found == expected
    assert found[0] == f"{ttf.GRADING_VERSION}.{Pdfa.grading_version}"


@pytest.mark.slow  # a process imports everything from a changed copy
def test_a_changed_docstring_invalidates_neither_grades_nor_documents(tmp_path):
    root, skip = Path(__file__).parents[3], shutil.ignore_patterns("prepared", "task", "*.pyc")
    for part in ("data", "eval", "kernels", "optim", "trainer"):
        shutil.copytree(root / part, tmp_path / part, ignore=skip, symlinks=True)
    shutil.copy(root / "model.py", tmp_path)
    for path in (tmp_path / "eval" / "rollout").rglob("*.py"):
        path.write_text(path.read_text().replace('"""', '"""Say it in other words. ', 1))
    code = (
        "from eval.rollout.tasks import task_of; from eval.rollout.ttf import grading_version; "
        f"task = task_of('{PDFA}'); print(grading_version(task), task._fingerprint())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    task = task_of(PDFA)
    assert found.stdout.split() == [ttf.grading_version(task), task._fingerprint()], found.stderr


def test_the_recorded_command_makes_the_run_again(graded, tmp_path, capsys):
    grade(capsys, graded)
    record = json.loads((graded / "ttf/step-00000004.json").read_text())
    assert "--tie_weights" not in record["command"]  # its value is the default
    first, second = (shlex.split(each) for each in record["command"].split(" && "))
    expected = "python -m eval.rollout.ttf NEW --episodes 16 --seed 0 --device "
    assert shlex.join(second[1:]).startswith(expected)
    threads = first[0].removeprefix("OMP_NUM_THREADS=")
    root = Path(__file__).parents[3]
    words = [f"--out_dir={tmp_path}" if word == "--out_dir=NEW" else word for word in first[3:]]
    subprocess.run(
        [sys.executable, root / "train.py", *words],
        env=os.environ | {"OMP_NUM_THREADS": threads},
        check=True,
        capture_output=True,
    )
    name = "checkpoints/step-00000004/model.safetensors"
    assert (graded / name).read_bytes() == (tmp_path / name).read_bytes()


def test_averaged_weights_are_graded_beside_the_last_ones(tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(argv(PDFA, out, **SIZES, ema_decay=0.9)) == 0
    grade(capsys, out)
    assert " adamw+ema " in grade(capsys, out, "--ema")
    last, averaged = load_records([out])[::-1]
    assert (last["variant"], averaged["variant"], averaged["base"]) == (
        "adamw",
        "adamw+ema",
        "adamw",
    )
    assert averaged["val_loss"] == metrics(out, "val")[-1]["ema_loss"]
    assert averaged["grade"]["metrics"] != last["grade"]["metrics"]
    assert averaged["command"].endswith(" --ema")


def test_a_run_without_averaged_weights_says_so(graded, capsys):
    with pytest.raises(SystemExit, match="2"):
        grade(capsys, graded, "--ema")
    assert "has no averaged weights" in capsys.readouterr().err


def test_every_checkpoint_that_was_kept_can_be_graded(graded, capsys):
    lines = grade(capsys, graded, "--all").splitlines()
    assert ["step 2 " in line for line in lines] == [True, False]
    assert "step 4 " in lines[1]


def test_a_context_holds_an_episode_or_is_refused():
    task = task_of(PDFA)
    ttf.check_fits(task, 8)
    with pytest.raises(TaskError, match="has block_size=7; use a shorter horizon"):
        ttf.check_fits(task, 7)


def test_a_context_too_short_for_an_episode_is_refused_before_training(dataset, tmp_path, capsys):
    assert train.main(argv(dataset, tmp_path / "run", ttf_every=2)) == 1
    assert "has block_size=16; use a shorter horizon" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("more", [[], ["--all"]])
def test_a_folder_without_checkpoints_is_one_message(tmp_path, capsys, more):
    with pytest.raises(SystemExit) as exit:
        ttf.main([str(tmp_path), *more])
    assert exit.value.code == 2
    assert "error: no checkpoint at" in capsys.readouterr().err
