"""Test that the table of runs agrees with the runs' own records."""

import json

import pytest

import train
from eval.summary import main, summarize, table
from tests.tiny import argv, metrics


def test_the_table_holds_the_last_validation_of_every_run(dataset, tmp_path, capsys):
    for name, changes in (("a", {}), ("b", {"dopr": True, "optimizer": "muon"})):
        train.main(argv(dataset, tmp_path / name, max_steps=3, **changes))
    capsys.readouterr()
    main([str(tmp_path / "a"), str(tmp_path / "b")])
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "optimizer", "steps", "val", "loss", "bits/byte", "tokens/s"]
    assert f"{metrics(tmp_path / 'a', 'val')[-1]['loss']:.4f}" in first
    assert second.split()[1:3] == ["dopr-muon", "3"]


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert f"error: {tmp_path}/config.json: cannot be read" in capsys.readouterr().err


VAL = {"kind": "val", "step": 3, "loss": 1.5, "bits_per_byte": None}


def write_run(folder, settings, *lines):
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))


def test_settings_with_names_of_an_earlier_release_are_understood(tmp_path):
    old = {"optimizer": "muon", "dopr": True, "muon_scale": "match_rms", "kernel": "auto"}
    write_run(tmp_path, old, json.dumps(VAL).encode())
    found = summarize(tmp_path)
    assert (found["optimizer"], found["val loss"], found["bits/byte"]) == ("dopr-muon", 1.5, None)
    assert "not finite" in table([found])


BAD_ROWS = [b"[1]", b"{", b"\xff", b'{"kind": "val"}', b'{"kind": "val", "step": 1, "loss": "x"}']


@pytest.mark.parametrize("line", BAD_ROWS, ids=range(5))
def test_a_damaged_row_is_named_by_its_line(tmp_path, line):
    write_run(tmp_path, {"optimizer": "sgd", "dopr": False}, json.dumps(VAL).encode(), line)
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: "):
        summarize(tmp_path)


@pytest.mark.parametrize("settings", [[], {}, {"optimizer": 3, "dopr": True}, "x"])
def test_a_damaged_config_is_named(tmp_path, settings):
    write_run(tmp_path, settings)
    with pytest.raises(ValueError, match=r"config.json: "):
        summarize(tmp_path)
