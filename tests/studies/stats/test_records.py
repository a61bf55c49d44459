"""Test the reading of records, and the quantities that the statistics take from them."""

import json
import lzma
import math

import pytest

from studies.stats.records import AnalysisError, load_records, teacher_forced
from tests.studies.records import record, write_lines, write_run

ROWS = [record("adamw", seed, 1.0) for seed in range(3)]


def test_records_come_from_studies_and_from_the_last_step_of_graded_runs(tmp_path):
    (tmp_path / "study").mkdir()
    write_lines(tmp_path / "study/records.jsonl", ROWS)
    write_run(tmp_path / "run", record("muon", 0, 1.0, steps=200))
    write_lines(tmp_path / "run/ttf/step-00000100.json", [record("muon", 0, 1.0, steps=100)])
    rows = load_records([tmp_path / "study", tmp_path / "run"])
    assert rows == [*ROWS, record("muon", 0, 1.0, steps=200, role="single")]


def test_compressed_records_are_read_unless_there_are_uncompressed_ones(tmp_path):
    path = tmp_path / "records.jsonl"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    path.with_name("records.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    assert load_records([tmp_path]) == ROWS
    write_lines(path, ROWS[:1])
    assert load_records([tmp_path]) == ROWS[:1]


def test_a_folder_without_records_is_an_error_with_the_command_to_run(tmp_path):
    with pytest.raises(AnalysisError, match=r"python -m eval\.rollout\.ttf"):
        load_records([tmp_path])


def line(**changes):
    return json.dumps(ROWS[0] | changes).encode()


GRADE = ROWS[0]["grade"]
RETURN = GRADE | {"metrics": {"return": GRADE["metrics"]["accumulated_kl"]}}


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("records.jsonl", line() + b'\n{"task": "pdfa"', "line 2: Invalid JSON"),
        ("records.jsonl", line() + b"\n[1]", "line 2: Input should be an object"),
        ("records.jsonl", b'{"task": "pdfa"}', "line 1: spec: Field required"),
        ("records.jsonl", line(seed="7"), "line 1: seed: .*integer"),
        ("records.jsonl", line(grade={}), "line 1: grade.metrics: Field required"),
        ("records.jsonl", line(primary="gap"), "line 1: .*the grade has no metric 'gap'"),
        ("records.jsonl", line(primary="return", grade=RETURN), "line 1: .*metric 'shortfall'"),
        ("records.jsonl", line(grade=GRADE | {"curves": {"B": [1]}}), "line 1: grade.curves.B: "),
        ("records.jsonl", b"\xff\xfe", "line 1: Invalid JSON"),
        ("records.jsonl.xz", b"no", "cannot be read"),
        ("ttf/step-00000100.json", b"{}", "line 1: task: Field required"),
    ],
)
def test_a_damaged_file_is_named_with_the_line_and_the_key_at_fault(
    tmp_path, name, content, problem
):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(AnalysisError, match=f"{name}(, |: ){problem}"):
        load_records([tmp_path])


def test_the_error_on_the_data_is_the_oracle_kl_if_the_task_has_an_oracle():
    assert teacher_forced(record("adamw", 0, 1.0, val_loss=3.0)) == 3.0
    row = record("adamw", 0, 1.0, val_loss=3.0)
    row["grade"]["metrics"]["val_kl"] = {"mean": 0.25}
    assert teacher_forced(row) == 0.25
    assert math.isnan(teacher_forced(record("adamw", 0, None)))
