"""Test the runs of the table of optimizers: cached, diverged, and those of other settings."""

import json
import math

import pytest

from studies import optimizer_table as table
from studies.sweep.run_cache import TrialError
from trainer.config import load_config


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Replace training by writing what train.py writes; return the folders that were trained."""
    folders = []

    def train_in(folder, command):
        folders.append(folder)
        folder.mkdir(parents=True)
        config, _ = load_config(command[1:], lambda settings: [])
        (folder / "config.json").write_text(json.dumps(vars(config), default=str))
        rows = [{"kind": "val", "loss": 2.0}, {"event": "end", "reason": "finished", "kind": "end"}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return "lr=1000" not in folder.name

    monkeypatch.setattr(table, "RUNS", tmp_path)
    monkeypatch.setattr(table, "train_in", train_in)
    return folders


def test_finished_and_diverged_runs_are_not_repeated(trained):
    for _ in range(2):
        assert table.run("adamw", 1e-3, 4) == 2.0
        assert table.run("adamw", 1000, 4) == math.inf
    assert len(trained) == 2


def test_a_folder_with_other_settings_is_refused(trained):
    table.run("adamw", 1e-3, 4)
    (trained[0] / "record.json").unlink()  # that of a run that was stopped before it was recorded
    path = trained[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta2": 0.5}))
    with pytest.raises(TrialError, match=r"holds another run: beta2 was 0\.5, is 0\.95"):
        table.run("adamw", 1e-3, 4)


def test_a_diverged_run_makes_the_mean_infinite():
    assert table.summary([2.0, 4.0])["mean"] == 3.0
    found = table.summary([math.inf, 2.0, 4.0])
    assert found["mean"] == math.inf
    assert math.isnan(found["sd"])
