"""Test that the table of runs agrees with the runs' own records."""

import train
from eval.summary import main
from tests.tiny import argv, metrics


def test_the_table_holds_the_last_validation_of_every_run(dataset, tmp_path, capsys):
    for name, changes in (("a", {}), ("b", {"dopr": True, "optimizer": "muon"})):
        train.main(argv(dataset, tmp_path / name, max_steps=3, **changes))
    capsys.readouterr()
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "optimizer", "steps", "val", "loss", "bits/byte", "tokens/s"]
    assert f"{metrics(tmp_path / 'a', 'val')[-1]['loss']:.4f}" in first
    assert second.split()[1:3] == ["dopr-muon", "3"]


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert f"error: {tmp_path} contains no run" in capsys.readouterr().err
