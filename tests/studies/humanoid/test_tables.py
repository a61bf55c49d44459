"""Test the table of returns: pairs by seed, and the rate with the best rollouts."""

import pytest

from eval.rollout.record import write_records
from studies.humanoid.tables import main, table
from studies.stats.records import RECORDS, read_records
from tests.studies.records import record


def run(variant, seed, value, **changes):
    """Return a record of a clone with a return."""
    numbers = {key: {"mean": value, "lo": 0, "hi": 9, "n": 8} for key in ("return", "shortfall")}
    numbers["falls"] = {"mean": 0.25, "lo": 0, "hi": 1, "n": 8}
    grade = {"metrics": numbers, "curves": {}, "n_t": {}, "samples": []}
    fields = {"grade": grade, "primary": "return", "higher_is_better": True, "val_loss": 0.002}
    fields["task"] = "humanoid"
    return record(variant, seed, value, **(fields | changes))


@pytest.fixture
def folder(tmp_path):
    records = [run("adamw", seed, 100.0 * seed) for seed in (1, 2, 3)]
    records += [run("adamw", seed, 50.0, lr=0.02, role="control") for seed in (1, 2, 3)]
    records += [run("dopr-adamw", seed, 100.0 * seed + 10 * seed, lr=0.02) for seed in (1, 2, 3)]
    records += [
        run("dopr-adamw", 0, value, lr=lr, role="tuning") for lr, value in ((0.01, 9), (0.02, 8))
    ]
    records += [run("adamw", 0, 5, lr=lr, role="tuning") for lr in (0.01,)]
    write_records(tmp_path / "study" / RECORDS, records)
    return tmp_path / "study"


def test_returns_are_paired_by_seed_with_the_base_at_both_rates(folder):
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(folder).split("\n")]
    adamw, dopr = lines[2:]
    assert adamw == ["`adamw`", "0.01", "0.00200", "200 ± 248", "0.25", "", "", ""]
    assert dopr[3:] == ["220 ± 273", "0.25", "+20 ± 25", "+170 ± 273", "0.01"]


def test_all_optimizers_can_be_compared_with_the_same_one(folder):
    adamw = table(folder, "dopr-adamw").split("\n")[2]
    assert "| -20 ± 25 |" in adamw


def test_a_diverged_run_is_counted_and_enters_no_mean(folder):
    records = [run("adamw", 4, 0.0, grade=None, val_loss=None), *read_records(folder / RECORDS)]
    write_records(folder / RECORDS, records)
    lines = table(folder).split("\n")
    assert "| 0.00200 | 200 ± 248 (1 of 4 diverged) | 0.25 |" in lines[2]
    assert "| +20 ± 25 |" in lines[3]


def test_an_optimizer_whose_runs_all_diverged_has_no_means(folder):
    kept = [each for each in read_records(folder / RECORDS) if each["variant"] != "dopr-adamw"]
    lost = [run("dopr-adamw", seed, 0.0, grade=None, val_loss=None) for seed in (1, 2)]
    write_records(folder / RECORDS, [*kept, *lost])
    line = next(line for line in table(folder).split("\n") if "dopr-adamw" in line)
    assert "|  | (2 of 2 diverged) |  |  |  |" in line


def test_the_command_prints_the_name_of_the_folder(folder, capsys):
    main([str(folder)])
    assert capsys.readouterr().out.startswith("study\n\n| ")
    with pytest.raises(SystemExit):
        main([str(folder.parent)])
    assert "contains neither records.jsonl nor ttf/" in capsys.readouterr().err


def test_the_losses_are_compared_with_that_of_a_given_base(folder, capsys):
    records = read_records(folder / RECORDS)
    for each in records:
        each["val_loss"] *= 1.5 if each["variant"] == "adamw" else 1
    write_records(folder / RECORDS, records)
    main([str(folder), "--base", "dopr-adamw"])
    *_, returns, last = capsys.readouterr().out.splitlines()
    assert returns.startswith("return / that of `dopr-adamw`: `adamw` ")
    assert last.startswith("val loss / that of `dopr-adamw`: `adamw` 1.50 [1.50")


def test_a_study_is_compared_with_another_one_from_a_seed_on(folder, tmp_path, capsys):
    other = tmp_path / "other"
    write_records(
        other / RECORDS, [run("dopr-adamw", seed, 110.0 * seed + 7, lr=0.02) for seed in (1, 2, 3)]
    )
    main([str(other), "--base", "dopr-adamw", "--base_folder", str(folder), "--first_seed", "2"])
    name, _, _, _, line, _, returns, losses = capsys.readouterr().out.splitlines()
    assert name == "other"
    assert "| `dopr-adamw` | 0.02 | 0.00200 | 282 | 0.25 | +7 | +7 |" in line
    assert returns.startswith("return / that of `dopr-adamw`: `dopr-adamw` 1.03")
    assert losses.startswith("val loss / that of `dopr-adamw`: `dopr-adamw` 1.00")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base", "adam"], "has no runs of adam; there are adamw, dopr-adamw"),
        (["--first_seed", "4"], "has no reported runs of the seeds from 4 on"),
    ],
)
def test_what_the_study_lacks_is_named(folder, words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(folder), *words])
    assert message in capsys.readouterr().err
