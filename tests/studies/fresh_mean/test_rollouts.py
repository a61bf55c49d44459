"""Test that the table compares the rollouts of `fresh_mean` with those of the other modes."""

import pytest

from studies.fresh_mean import rollouts
from studies.fresh_mean.rollouts import table
from tests.studies.records import fresh, write_study

NAME = "fast-dopr-adamw+fresh_mean=true"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "RESULTS", tmp_path / "study")
    monkeypatch.setattr(rollouts, "FRESH", tmp_path / "fresh")
    known = [*fresh("adamw", [4.0, 4.0, 4.0]), *fresh("fast-dopr-adamw", [1.0, 1.0, 1.0], lr=0.02)]
    known += [each | {"role": "control", "lr": 0.03} for each in fresh("adamw", [8.0, 8.0, 8.0])]
    write_study(tmp_path / "study/pdfa-500", [*known, *fresh("muon", [3.0, 3.0, 3.0])])
    own = fresh(NAME, [2.0, 2.0, 2.0], lr=0.03, base="adamw")
    write_study(tmp_path / "fresh/pdfa-500", own)


def test_every_mode_that_ran_has_a_row_with_its_ratios(folders):
    _, _, *rows = table().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[2] for row in cells] == ["base", "fast", "fresh mean"]  # muon has no fresh mean
    one = {"base": 4.0, "base at this lr": 8.0, "fast": 1.0}
    expected = [f"{2 / other:.2f} [{2 / other:.2f}, {2 / other:.2f}]" for other in one.values()]
    assert cells[2][3:] == ["0.03", "2", *expected, ""]


def test_the_committed_records_give_a_table():
    assert "fresh mean" in table()
