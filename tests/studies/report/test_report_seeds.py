"""What a page says where seeds are few, and what it refuses to read."""

import json
import re

import pytest

from studies.report.__main__ import main
from tests.studies.small_studies import SEEDS, fresh, graded, study, write_run, write_study


def test_single_runs_are_compared_without_claims_about_seeds(tmp_path, report):
    runs = [graded("muon", 7, 4.0), graded("dopr-muon", 7, 3.0)]
    folders = [write_run(tmp_path / run["variant"], run) for run in runs]
    page = report(*folders)
    assert "one run with one seed of each" in page.text
    # The interval is that of the episodes, 0 to 9; the difference has none.
    assert page.row("dopr-muon")[2:5] == ["3.0 ± 4.5", "× 0.750", "one seed"]
    assert "seeds won" not in page.text


def test_single_runs_of_one_variant_are_told_apart(tmp_path, report):
    runs = [graded("muon", 7, 4.0, settings={"out_dir": name}) for name in ("a", "b")]
    folders = [write_run(tmp_path / run["settings"]["out_dir"], run) for run in runs]
    page = report(*folders)
    assert page.row("muon (a)")
    assert page.row("muon (b)")


def test_studies_single_runs_and_other_knobs_have_leaderboards_of_their_own(tmp_path, report):
    other = fresh("adamw", [1.0, 2.0, 3.0], spec="task:pdfa,instance=4,states=32")
    folders = [write_study(tmp_path / "one", study()), write_study(tmp_path / "two", other)]
    page = report(*folders, write_run(tmp_path / "run", graded("adamw", 7, 9.0)))
    assert [cell for row in page.rows for cell in row].count("against base") == 3
    assert "Each variant against its base optimizer" in page.text


def test_two_fresh_seeds_have_no_intervals(tmp_path, report):
    rows = [record for record in study() if record["seed"] != SEEDS[2]]
    page = report(write_study(tmp_path / "study", rows, fresh_seeds=[*SEEDS[:2]]))
    assert page.row("dopr-adamw")[2:10] == [
        "3.550",
        "3.550",
        "× 0.640",
        "",
        "2/2",
        "–",
        "× 0.640",
        "two seeds",
    ]


def test_one_fresh_seed_claims_nothing(tmp_path, report):
    rows = [record for record in study() if record["seed"] in (0, SEEDS[0])]
    folder = write_study(tmp_path / "study", rows, fresh_seeds=[SEEDS[0]])
    page = report(folder)
    assert page.row("dopr-adamw")[7:10:2] == ["–", "one seed"]


def broken(tmp_path, fault):
    folder = write_study(tmp_path / "study", study())
    records, protocol = folder / "records.jsonl", folder / "protocol.json"
    if fault == "no protocol":
        protocol.unlink()
    elif fault == "lacks a key":
        records.write_text(json.dumps({"task": "pdfa"}))
    else:
        records.write_text({"empty": "", "not JSON": "{"}[fault])
    return folder


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("empty", "has no records; run `python -m studies.sweep.compare`"),
        ("not JSON", "expected one JSON record per line"),
        ("lacks a key", "record 1 lacks spec, primary"),
        ("no protocol", "protocol.json: missing"),
    ],
)
def test_a_study_that_cannot_be_read_is_an_error_before_any_work(tmp_path, capsys, fault, message):
    folder = broken(tmp_path, fault)
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 2
    assert re.match(f"error: {folder}.*{re.escape(message)}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'nothing'}: contains neither")
