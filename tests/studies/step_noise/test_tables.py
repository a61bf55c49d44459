"""Test the table of the agreements that were written to a file."""

import json

import pytest

from studies.step_noise.tables import main

SPEC = "task:humanoid,whitening=0.0"


@pytest.fixture
def file(tmp_path):
    rows = [
        {"task": task, "seed": seed, "agreements": {"0": [0.5, x, 0.3, 2 * x], "2": [0.7, x, x, x]}}
        for task in (SPEC, f"{SPEC},batch_size=64")
        for seed, x in ((0, 0.1), (1, 0.3))
    ]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    return tmp_path / "rows.json"


def test_a_cell_has_the_mean_over_seeds_of_each_layer_and_their_mean(file, capsys):
    main([str(file)])
    _, _, *lines = capsys.readouterr().out.splitlines()
    plain, small = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert plain[:3] == ["as it is", "2", "0.50, 0.70: 0.600"]
    assert plain[3:] == [
        *("0.20, 0.20: 0.200", "0.30, 0.20: 0.250", "0.40, 0.20: 0.300", "2.00, 1.00"),
    ]
    assert small[0] == "batch_size=64"


def test_a_missing_file_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "rows.json")])
    assert "rows.json: there is no such file" in capsys.readouterr().err
