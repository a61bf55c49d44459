"""Test the table of the grid: what is marked, and what did not run or diverged."""

import pytest

from eval.rollout.record import write_records
from studies.humanoid.grid import grid_table, main
from studies.stats.records import RECORDS
from tests.studies.humanoid.test_tables import run

SEEDS = (200, 201, 202)


def runs(variant, value, lr=0.01, role="fresh"):
    """Return runs whose returns are nearly the same on all seeds."""
    return [run(variant, seed, value + seed % 3, lr=lr, role=role) for seed in SEEDS]


@pytest.fixture
def cells(tmp_path):
    """Return a function that gives the cells of AdamW's row for some records."""

    def of(*groups):
        records = [record for group in groups for record in group]
        write_records(tmp_path / "grid-walk-1-20" / RECORDS, records)
        line = next(x for x in grid_table(tmp_path).splitlines() if "`adamw`" in x)
        return [cell.strip() for cell in line.strip("|").split("|")]

    return of


def test_a_clear_difference_at_both_rates_is_marked(cells):
    better, worse = runs("fast-dopr-adamw", 500), runs("dopr-adamw", 100)
    found = cells(runs("adamw", 300), better, worse)
    assert found == ["`walk-1-20`", "`adamw`", "301", "**501**", "", "*101*", "-400 ± 0"]


def test_a_difference_at_one_rate_only_is_not_marked(cells):
    better = runs("fast-dopr-adamw", 500, lr=0.02)
    found = cells(runs("adamw", 300), runs("adamw", 500, lr=0.02, role="control"), better)
    assert found[3] == "501"


def test_diverged_runs_are_counted(cells):
    lost = [run("dopr-adamw", seed, 0.0, grade=None, val_loss=None) for seed in SEEDS]
    partly = [*runs("fast-dopr-adamw", 500)[:2], lost[0] | {"variant": "fast-dopr-adamw"}]
    found = cells(runs("adamw", 300), partly, lost)
    assert found[3] == "501 (1 diverged)"
    assert found[5] == "diverged"


def test_a_folder_without_the_grid_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert "has no records of the grid" in capsys.readouterr().err
