"""Test that the table of the `fresh_mean` study pairs the losses by seed."""

import json

import pytest

from studies import optimizer_table
from studies.fresh_mean import comparison
from studies.fresh_mean.comparison import (
    MODES,
    RUN,
    SETUPS,
    difference,
    main,
    rows_of,
    table_of,
    tuned_rates,
)


def test_a_difference_is_paired_and_has_a_t_interval():
    assert difference([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]) == "-1.000 ± 0.000"
    assert difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]) == "+2.000 ± 2.484"  # 4.303 / √3


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(comparison, "map_in_pool", lambda f, tasks, *_: [*map(f, tasks)])


def test_every_mode_is_tuned_on_one_seed_and_measured_on_others(monkeypatch):
    calls = []

    def run(optimizer, lr, seed, **dopr):
        calls.append((lr, seed, dopr))
        return 4.0 + seed / 100 - ("fresh_mean" in dopr)

    monkeypatch.setattr(comparison, "run", run)
    monkeypatch.setattr(comparison, "sweep", lambda *_, seed: {1.0: 5.0, 2.0: 4.0, 4.0: seed})
    rows = rows_of([("plain", "adamw", mode) for mode in MODES], 2)
    assert {lr for lr, *_ in calls} == {2.0}
    assert {seed for _, seed, _ in calls} == {11, 12, 13, 14, 15}
    assert len(calls) == 5 * (len(MODES) + 1)  # the base runs once for the rate that all share
    table = table_of(rows)
    assert table.count("-1.000 ± 0.000") == 3  # fresh mean against both bases and fast mode


def test_a_setup_changes_all_modes_and_the_folder_of_the_run(monkeypatch, tmp_path):
    commands = []

    def train_in(folder, command):
        commands.append((folder.name, command))
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"kind": "val", "loss": 4.0}, {"event": "end", "reason": "finished", "kind": "run"}]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return True

    monkeypatch.setattr(optimizer_table, "RUNS", tmp_path)
    monkeypatch.setattr(optimizer_table, "train_in", train_in)
    rows_of([("width-128", "adamw", "fast")], 2)
    assert all("--n_embd=128" in command for _, command in commands)
    assert all("n_embd=128" in name for name, _ in commands)
    assert {"--dopr=True" in command for _, command in commands} == {True, False}


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_every_setup_has_the_same_number_of_tokens(setup):
    own = RUN | setup
    for key in ("max_steps", "eval_batches"):
        assert own[key] * own["batch_size"] == RUN[key] * RUN["batch_size"]


@pytest.mark.parametrize("option", ["--optimizers=adam", "--setups=width-3", "--modes=slow"])
def test_an_unknown_name_is_refused(tmp_path, option):
    with pytest.raises(SystemExit):
        main_with(["--out", str(tmp_path / "x.json"), option])


def main_with(argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["fresh_mean", *argv])
        main()


def test_a_row_that_is_not_committed_is_named():
    with pytest.raises(ValueError, match=r"sgd: fresh_mean.json has no fresh mean of it; run"):
        tuned_rates("adamw,sgd")
