"""What a page says of one task: how many comparisons there are, and which ones stand."""

import pytest

from studies.report.report import overview
from studies.report.sections import make_sections
from tests.studies.records import record
from tests.studies.small_studies import fresh, study

CLEAR = [*fresh("adamw", [5.0, 6.0, 7.0]), *fresh("dopr-adamw", [4.0, 4.5, 6.2])]  # p = 0.0489


def entry(rows, name):
    (section,) = make_sections(rows)
    return next(each for each in section.entries if each.variant == name)


@pytest.mark.parametrize("others", [0, 1])
def test_a_p_must_be_below_the_threshold_of_all_comparisons(others):
    rows = [*CLEAR, *fresh("fast-dopr-adamw", [None] * 3)[: 3 * others]]
    (section,) = make_sections(rows)
    versus = entry(rows, "dopr-adamw").versus
    assert versus is not None
    assert (versus.p, versus.verdict) == ("0.049", "better")
    assert section.n_comparisons == 1 + others  # one whose runs diverged was a comparison too
    assert versus.is_strict == (others == 0)


@pytest.mark.parametrize(("controls", "expected"), [(0, False), (2, False), (3, True)])
def test_no_star_without_controls(controls, expected):
    rows = [each | {"lr": 0.02} if each["variant"] != "adamw" else each for each in CLEAR]
    at_this_rate = fresh("adamw", [7.0, 8.0, 9.0], role="control", lr=0.02)
    versus = entry([*rows, *at_this_rate[:controls]], "dopr-adamw").versus
    assert versus is not None
    assert (versus.verdict, versus.is_strict) == ("better", expected)


@pytest.mark.parametrize(("planned", "n"), [(0, 1), (1, 1), (71, 71)])
def test_the_threshold_is_that_of_all_planned_comparisons_but_never_of_fewer_than_shown(planned, n):
    (section,) = make_sections(CLEAR, planned)
    assert section.family.n == n
    assert section.family.threshold == 0.05 / n
    (wide,) = make_sections([*CLEAR, *fresh("fast-dopr-adamw", [4.0, 5.0, 6.0])], planned)
    assert wide.family.n == max(n, 2)


def test_a_variant_of_which_five_of_eight_runs_diverged_is_called_so_whatever_is_left():
    base = [record("adamw", seed, 9.0 + seed) for seed in range(8)]
    ours = [record("dopr-adamw", seed, None if seed < 5 else 1.0 + seed / 9) for seed in range(8)]
    versus = entry([*base, *ours], "dopr-adamw").versus
    assert versus is not None
    assert (versus.verdict, versus.is_strict, versus.wins) == ("diverged", False, "3/8")
    both = [record("adamw", seed, None if seed < 5 else 9.0 + seed) for seed in range(8)]
    versus = entry([*both, *ours], "dopr-adamw").versus
    assert versus is not None
    assert versus.verdict == "better"


def test_sections_of_one_task_are_told_apart_by_the_knobs_that_differ():
    rows = [each | {"spec": "task:pdfa,instance=1,states=8,horizon=64"} for each in CLEAR]
    (alone,) = make_sections(rows)
    assert alone.name == "pdfa"
    other = [each | {"spec": "task:pdfa,instance=1,states=9,horizon=64"} for each in CLEAR]
    longer = [each | {"steps": 1500} for each in rows]
    found = [(each.name, each.steps) for each in make_sections([*rows, *other, *longer])]
    names = ("pdfa, states=8", "pdfa, states=9", "pdfa, states=8")
    assert found == [*zip(names, (500, 500, 1500), strict=True)]


def test_the_overview_has_an_entry_wherever_a_variant_was_run():
    lost = [*fresh("adamw", [5.0, 6.0, 7.0]), *fresh("dopr-adamw", [None, None, None])]
    rows = [*lost, *(run | {"task": "nav"} for run in study())]
    found = overview([{"about": section} for section in make_sections(rows)])
    cells = dict(found["rows"])["dopr-adamw"]
    assert [(each.diverged, each.n_runs) for each in cells] == [(0, 3), (3, 3)]
    assert "adamw" not in dict(found["rows"])


def test_runs_are_compared_with_the_error_that_the_grade_has():
    with_oracle, without = study(), study()
    for run in without:
        if run["grade"]:
            del run["grade"]["metrics"]["val_kl"]
    (section,), (other,) = make_sections(with_oracle), make_sections(without)
    names = section.error_on_data, other.error_on_data
    assert names == ("oracle KL on the data’s contexts", "validation loss")
