"""Grading checkpoints by command, and while training."""

import json

import pytest

import train
from eval import ttf
from eval.record import write_record
from tests.tiny import argv, metrics

PDFA = "task:pdfa,states=4,alphabet=4,horizon=8,n_documents=64"
SIZES = {"block_size": 8, "max_steps": 4, "eval_every": 4, "save_every": 2, "warmup_steps": 1}


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A run on a task, graded every other step."""
    out = tmp_path_factory.mktemp("graded") / "run"
    assert train.main(argv(PDFA, out, **SIZES, ttf_every=2, ttf_episodes=8)) == 0
    return out


def grade(capsys, *arguments):
    ttf.main([*map(str, arguments), "--episodes", "16"])
    return capsys.readouterr().out


def test_training_records_what_rollouts_cost(graded):
    rows = metrics(graded, "ttf")
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert all(row["accumulated_kl"] > 0 for row in rows)


def test_grading_while_training_changes_no_weight(graded, tmp_path):
    assert train.main(argv(PDFA, tmp_path / "plain", **SIZES)) == 0
    name = "checkpoints/step-00000004/model.safetensors"
    assert (graded / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_record_says_everything_and_is_not_computed_twice(graded, capsys):
    line = grade(capsys, graded)
    (path,) = (graded / "ttf").glob("step-00000004.json")
    record = json.loads(path.read_text())
    mean = record["grade"]["metrics"]["accumulated_kl"]["mean"]
    assert f"accumulated_kl {mean:.4f}" in line
    assert record["val_loss"] == metrics(graded, "val")[-1]["loss"]
    assert (record["task"], record["variant"], record["steps"]) == ("pdfa", "adamw", 4)
    record["grade"]["metrics"]["accumulated_kl"]["mean"] = -1.0
    write_record(path, record)
    assert "accumulated_kl -1.0000" in grade(capsys, graded)  # read, not computed
    ttf.main([str(graded), "--episodes", "8"])  # another grading is another number
    assert "-1.0000" not in capsys.readouterr().out


def test_every_checkpoint_that_was_kept_can_be_graded(graded, capsys):
    lines = grade(capsys, graded, "--all").splitlines()
    assert ["step 2 " in line for line in lines] == [True, False]
    assert "step 4 " in lines[1]


def test_a_context_too_short_for_an_episode_is_refused_before_training(dataset, tmp_path, capsys):
    assert train.main(argv(dataset, tmp_path / "run", ttf_every=2)) == 1
    assert "has block_size=16; use a shorter horizon" in capsys.readouterr().err
    assert not metrics(tmp_path / "run", "train")


def test_a_folder_without_checkpoints_is_one_message(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        ttf.main([str(tmp_path)])
    assert exit.value.code == 2
    assert "error: no checkpoint at" in capsys.readouterr().err
