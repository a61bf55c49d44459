"""The tables of README.md are those of the committed records."""

from pathlib import Path

import pytest

from bench.rollout_table import main, table
from tests.eval.studies import graded, study, write_study

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results/study"


def test_a_line_has_the_planned_ratio_and_that_at_equal_rates(tmp_path):
    controls = [
        graded("adamw", seed, 2 * value, role="control", lr=0.02)
        for seed, value in zip((100, 101, 102), (3.0, 4.1, 5.0), strict=True)
    ]
    rows = [
        each | {"lr": 0.02} if each["variant"] == "dopr-adamw" else each
        for each in study()
        if each["role"] == "fresh"
    ]
    text = table([write_study(tmp_path / "study", [*rows, *controls])], 1)
    header, _, first, *_ = text.splitlines()
    assert header == "|  | pdfa, 500 steps: accumulated_kl | at equal rates |"
    assert first == "| dopr-adamw | 0.664 [0.530, 0.832] * | 0.500 [0.500, 0.500] |"
    assert "dopr-muon" in text
    assert "| muon" not in text  # a base is compared with nothing


def test_a_folder_without_records_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert f"error: {tmp_path}: neither records.jsonl" in capsys.readouterr().err
