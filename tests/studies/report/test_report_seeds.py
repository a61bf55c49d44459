"""Test reports on few seeds and on single runs, and reports that are refused."""

import json
import re

import pytest

from studies.report.__main__ import main
from tests.studies.records import SEEDS, fresh, graded, study, write_run, write_study


def test_a_comparison_of_single_runs_claims_nothing_about_seeds(tmp_path, report):
    runs = [graded("muon", 7, 4.0), graded("dopr-muon", 7, 3.0)]
    page = report(*(write_run(tmp_path / run["variant"], run) for run in runs))
    # The interval of a run is over its episodes, 0 to 9. The ratio has no interval.
    assert page.row("dopr-muon")[2:5] == ["3.0 ± 4.5", "× 0.750", "one seed"]
    assert "seeds won" not in page.text


def test_single_runs_of_one_variant_are_named_after_their_folders(tmp_path, report):
    runs = [graded("muon", 7, 4.0, settings={"out_dir": name}) for name in ("a", "b")]
    page = report(*(write_run(tmp_path / run["settings"]["out_dir"], run) for run in runs))
    assert page.row("muon (a)")
    assert page.row("muon (b)")


def test_studies_single_runs_and_other_knobs_have_separate_leaderboards(tmp_path, report):
    other = fresh("adamw", [1.0, 2.0, 3.0], spec="task:pdfa,instance=4,states=32")
    folders = [write_study(tmp_path / "one", study()), write_study(tmp_path / "two", other)]
    page = report(*folders, write_run(tmp_path / "run", graded("adamw", 7, 9.0)))
    assert [cell for row in page.rows for cell in row].count("against base") == 3


@pytest.mark.parametrize(
    ("n_seeds", "wins", "verdict"), [(2, "2/2", "two seeds"), (1, "1/1", "one seed")]
)
def test_fewer_than_three_seeds_give_neither_intervals_nor_p(
    n_seeds, wins, verdict, tmp_path, report
):
    seeds = [*SEEDS[:n_seeds]]
    rows = [record for record in study() if record["seed"] in (0, *seeds)]
    row = report(write_study(tmp_path / "study", rows, fresh_seeds=seeds)).row("dopr-adamw")
    assert "[" not in row[4]  # the ratio
    assert (row[6], row[7], row[9]) == (wins, "–", verdict)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("records.jsonl", "", "has no records; run `python -m studies.sweep.compare`"),
        ("records.jsonl", "{", "records.jsonl, line 1: Invalid JSON"),
        ("protocol.json", None, "protocol.json: cannot be read"),
        ("protocol.json", "[]", "protocol.json: Input should be an object"),
        ("protocol.json", "{}", "protocol.json: command: Field required"),
        ("temperature.jsonl", "{", "temperature.jsonl, line 1: Invalid JSON"),
        ("temperature.jsonl", json.dumps(study()[0]), "line 1: temperature: Field required"),
        (
            "temperature.jsonl",
            json.dumps(study()[0] | {"temperature": 0.5, "lr": 0.04}),
            "adamw is not the model of records.jsonl",
        ),
    ],
)
def test_a_damaged_study_is_an_error_before_any_work(tmp_path, capsys, file, content, problem):
    folder = write_study(tmp_path / "study", study())
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 2
    assert re.match(f"error: {folder}.*{re.escape(problem)}.*\n$", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_does_not_exist_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 2
    assert f"error: {tmp_path / 'nothing'}: contains neither" in capsys.readouterr().err
