"""Test the table of rollouts with a rate of the embedding: what is tuned, and what is compared."""

import pytest

from eval.rollout.record import write_records
from studies.rollout.embedding import BASE, FAST, STAGES, with_rate
from studies.rollout.embedding_table import main, table
from studies.stats.records import RECORDS
from studies.sweep.variants import parse_variant
from tests.studies.records import record

SEEDS = (200, 201, 202)


def runs(mode, rate, error, tuning_loss, lr=0.01):
    """Return the tuning runs and, with nearly the same error on all seeds, the fresh runs."""
    name = with_rate(mode, rate)
    base = parse_variant(name).base
    fields = {"base": base, "lr": lr}
    tuning = [
        record(name, seed, error, role="tuning", val_loss=tuning_loss, **fields) for seed in (0, 1)
    ]
    fresh = [record(name, seed, error * (1 + seed % 3 / 100), **fields) for seed in SEEDS]
    return [*tuning, *fresh]


@pytest.fixture
def rows(tmp_path):
    records = runs(BASE, None, 100.0, 2.0) + runs(FAST, None, 50.0, 1.5)
    records += runs(BASE, 0.016, 40.0, 1.0) + runs(BASE, 0.064, 20.0, 3.0)
    records += runs(FAST, 0.016, 10.0, 4.0) + runs(FAST, 0.064, 30.0, 1.0, lr=0.02)
    lower = {"base": with_rate(BASE, 0.064), "lr": 0.02, "role": "control"}
    records += [record(with_rate(BASE, 0.064), seed, 60.0, **lower) for seed in SEEDS]
    write_records(tmp_path / "pdfa" / RECORDS, records)
    return [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table(tmp_path).split("\n")
    ][2:]


def test_modes_are_compared_with_one_rate_and_with_the_tuned_rate_of_the_embedding(rows):
    assert [row[1:4] for row in rows] == [
        ["base", "as others", "0.01"],
        ["fast", "as others", "0.01"],
        ["base", "0.016", "0.01"],  # not 0.064, whose errors are lower
        ["fast", "0.064", "0.02"],
    ]
    assert [row[5] for row in rows] == ["101", "50.5", "40.4", "30.3"]


def test_ratios_are_to_the_tuned_base_and_to_the_base_at_the_same_two_rates(rows):
    assert rows[0][6:] == rows[2][6:] == ["", ""]
    assert rows[1][6:] == ["0.500 [0.500, 0.500]"] * 2
    assert [cell.split()[0] for cell in rows[3][6:]] == ["0.750", "0.505"]


def test_every_variant_has_a_base_of_its_stage():
    for stage in STAGES:
        assert {parse_variant(name).base for name in stage.optimizers} <= {*stage.optimizers}


def test_a_folder_without_records_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert "has no records of studies.rollout.embedding" in capsys.readouterr().err
