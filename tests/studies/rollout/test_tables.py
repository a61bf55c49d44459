"""Test that the tables of the rollout study and docs/results.md agree with the records."""

import re
from pathlib import Path

import pytest

from studies.rollout import embedding_table
from studies.rollout.ablations import changes_table
from studies.rollout.all_stages import STAGES
from studies.rollout.results import RESULTS
from studies.rollout.tables import (
    BASES_APART,
    TAU,
    against_table,
    all_tables,
    equal_validation_table,
    group_table,
    main,
    temperature_table,
    tuning_table,
)
from tests.studies.records import fresh, graded, study, write_lines, write_study
from tests.studies.stats.test_matched import noisy

RESULTS_PAGE = Path(__file__).parents[3] / "docs" / "results.md"
INTERVAL = r"(\d[\d.]*)\s+\[([\d.]+),\s+([\d.]+)\]"


def with_controls():
    """Return a study in which DoPr has twice the base's rate and, at it, half of its error."""
    values = zip((100, 101, 102), (3.0, 4.1, 5.0), strict=True)
    controls = [graded("adamw", s, 2 * v, role="control", lr=0.02) for s, v in values]
    fresh = [each for each in study() if each["role"] == "fresh"]
    return controls + [
        each | {"lr": 0.02} if each["variant"] == "dopr-adamw" else each for each in fresh
    ]


def test_a_row_has_the_ratio_at_tuned_and_at_equal_rates(tmp_path):
    write_study(tmp_path / "pdfa-500", with_controls())
    header, _, first, *_ = group_table("500 steps", tmp_path).splitlines()
    assert header == "|  | pdfa, 500 steps: accumulated_kl | at equal rates |"
    assert first == "| dopr-adamw | 0.664 [0.530, 0.832] | 0.500 [0.500, 0.500] |"  # p = .016
    assert "dopr-muon" in group_table("500 steps", tmp_path)
    assert "| muon" not in group_table("500 steps", tmp_path)  # a base


def test_variants_are_compared_with_their_bases_at_their_own_temperatures(tmp_path):
    folder = write_study(tmp_path / "nav-1500", study())
    rows = [each | {"temperature": 0.5} for each in study() if each["role"] == "fresh"]
    write_lines(folder / "temperature.jsonl", rows)
    header, _, first, *_ = temperature_table(STAGES, tmp_path).splitlines()
    assert header == "|  | nav, 1500 steps | at equal rates and temperatures |"
    assert first == "| dopr-adamw | 0.664 [0.530, 0.832] |  |"
    equal = [row | {"role": "control"} for row in rows if row["variant"] == "adamw"]
    write_lines(folder / "temperature.jsonl", [*rows, *equal])
    first = temperature_table(STAGES, tmp_path).splitlines()[2]
    assert first == "| dopr-adamw | 0.664 [0.530, 0.832] | 0.664 [0.530, 0.832] |"


def test_an_ablation_is_compared_with_dopr_without_the_change(tmp_path):
    def fresh(variant, values, loss):
        rows = zip((200, 201, 202), values, strict=True)
        return [graded(variant, s, v, base="adamw", val_loss=v / 8 + loss) for s, v in rows]

    runs = [*fresh("adamw", (9.0, 9.0, 9.0), 0), *fresh("dopr-adamw", (4.0, 5.0, 6.0), 0)]
    changed = fresh("dopr-adamw+gamma=1", (2.0, 2.5, 3.0), 0.5)
    runs += [each | {"lr": 0.02} for each in changed]
    errors = {"dopr-adamw": (4.0, 4.0, 9.0), "dopr-adamw+gamma=1": (1.0, 9.0, None)}
    for name, values in errors.items():  # at 0.01, 0.02, 0.04
        rates = zip((0.01, 0.02, 0.04), values, strict=True)
        changes = {"base": "adamw", "role": "tuning"}
        runs += [graded(name, 0, value, lr=lr, **changes) for lr, value in rates]
    write_study(tmp_path / "ablations-ctrl-500", runs)
    header, _, *lines = changes_table(tmp_path).splitlines()
    assert header.startswith("|  | ctrl: accumulated_kl | validation loss, nats | learning rates |")
    ratio, loss = "0.500 [0.500, 0.500]", "+0.19 ± 0.16"  # 0.5 - (4, 5, 6) / 16
    assert lines == [f"| dopr-adamw+gamma=1 | {ratio} | {loss} | 0.02 / 0.01 | 0.750 (1/2) |"]


def test_a_stage_without_records_has_no_table(tmp_path):
    for stage in ("pdfa-500", "ablations-ctrl-500"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "records.jsonl").touch()
    assert group_table("1,500 steps", tmp_path) == tuning_table(tmp_path / "nothing") == ""
    assert "##" not in all_tables(tmp_path)


def test_optimizers_whose_tuning_seeds_disagree_are_counted(tmp_path):
    def tuned(variant, losses):  # losses of each seed at 0.01 and 0.02; None if it diverged
        return [
            graded(variant, seed, 1.0 if loss else None, role="tuning", lr=lr, val_loss=loss)
            for seed, pair in enumerate(losses)
            for lr, loss in zip((0.01, 0.02), pair, strict=True)
        ]

    runs = [*tuned("adamw", [(1.0, 2.0), (2.0, 1.0)]), *tuned("muon", [(1.0, 2.0), (3.0, None)])]
    write_study(tmp_path / "pdfa-500", runs)
    assert tuning_table(tmp_path).splitlines()[-1] == "| pdfa-500 | 1 of 2 |"


def test_a_variant_that_the_study_does_not_plan_is_last(tmp_path):
    others = [each | {"variant": "dopr-adamw+gamma=3"} for each in fresh("adamw", [5.0, 6.0, 7.0])]
    write_study(tmp_path / "pdfa-500", [*study(), *others])
    assert group_table("500 steps", tmp_path).splitlines()[-1].startswith("| dopr-adamw+gamma=3 |")


def test_records_that_do_not_belong_together_are_an_error(tmp_path, capsys):
    write_study(tmp_path / "pdfa-500", [*study(), *study()])
    with pytest.raises(SystemExit, match="2"):
        main(["--results", str(tmp_path)])
    assert "error: task:pdfa, 500 steps, adamw, seed 100: 2" in capsys.readouterr().err


def test_all_optimizers_can_be_compared_with_the_same_one(tmp_path):
    write_study(tmp_path / "pdfa-500", study())
    _, _, *lines = against_table("muon", tmp_path).splitlines()
    found = {line.split("|")[1].strip(): line.split("|")[2].split()[0] for line in lines}
    assert found.keys() == {"adamw", "dopr-adamw", "fast-dopr-adamw", "dopr-muon"}
    assert float(found["adamw"]) == pytest.approx((5 / 4 * 6 / 5 * 7 / 6) ** (1 / 3), abs=5e-3)


def test_the_table_at_equal_validation_ends_with_tau_and_the_difference_of_two_bases(tmp_path):
    write_study(tmp_path / "pdfa-500", noisy(0))
    header, _, *lines = equal_validation_table(tmp_path).splitlines()
    assert header == "|  | pdfa, 500 steps: error | seeds |"
    names = [line.split("|")[1].strip() for line in lines]
    assert names[-2:] == [TAU, BASES_APART]
    factors = [line.split("|")[2].strip() for line in lines]
    assert float(factors[-1]) > 1  # of five bases
    assert -1 <= float(factors[-2]) <= 1


def test_the_committed_tables_match_the_committed_records():
    assert (RESULTS / "tables.md").read_text() == all_tables() + "\n"


def test_the_intervals_in_the_docs_are_rounded_from_the_tables():
    text = (RESULTS / "tables.md").read_text()
    text += embedding_table.table(RESULTS.parent / "embedding_rate")
    tables = re.findall(INTERVAL, text)
    quoted = re.findall(rf"x\s+{INTERVAL}", RESULTS_PAGE.read_text())
    assert quoted
    assert not [each for each in quoted if not any(is_rounded(each, table) for table in tables)]


def is_rounded(quoted, exact):
    """Whether the numbers of `quoted` are those of `exact`, which has more digits, rounded."""
    units = [10.0 ** -len(text.partition(".")[2]) for text in quoted]
    numbers = zip(map(float, quoted), map(float, exact), units, strict=True)
    return all(abs(short - long) < 0.56 * unit for short, long, unit in numbers)
