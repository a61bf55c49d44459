"""Test the sections of a report: their comparisons, stars and names."""

import pytest

from studies.report.report import overview
from studies.report.sections import make_sections
from tests.studies.records import fresh, record, study

CLEAR = [*fresh("adamw", [5.0, 6.0, 7.0]), *fresh("dopr-adamw", [4.0, 4.5, 6.2])]  # p = 0.0489


def versus_base(rows):
    """Return the comparison of dopr-adamw with adamw."""
    (section,) = make_sections(rows)
    (found,) = (each.versus for each in section.entries if each.variant == "dopr-adamw")
    assert found is not None
    return found


@pytest.mark.parametrize("others", [0, 1])
def test_a_star_needs_a_p_below_the_threshold_of_all_comparisons(others):
    rows = [*CLEAR, *fresh("fast-dopr-adamw", [None] * 3)[: 3 * others]]
    (section,) = make_sections(rows)
    versus = versus_base(rows)
    assert (versus.p, versus.verdict) == ("0.049", "better")
    assert section.n_comparisons == 1 + others  # a variant that always diverged counts
    assert versus.is_strict == (others == 0)


@pytest.mark.parametrize(("controls", "expected"), [(0, False), (2, False), (3, True)])
def test_a_star_needs_three_controls_at_equal_rates(controls, expected):
    rows = [each | {"lr": 0.02} if each["variant"] != "adamw" else each for each in CLEAR]
    at_this_rate = fresh("adamw", [7.0, 8.0, 9.0], role="control", lr=0.02)
    versus = versus_base([*rows, *at_this_rate[:controls]])
    assert (versus.verdict, versus.is_strict) == ("better", expected)


@pytest.mark.parametrize(("planned", "n"), [(0, 1), (1, 1), (71, 71)])
def test_the_threshold_counts_the_planned_comparisons_or_the_shown_ones_if_more(planned, n):
    (section,) = make_sections(CLEAR, planned)
    assert section.family.n == n
    (wide,) = make_sections([*CLEAR, *fresh("fast-dopr-adamw", [4.0, 5.0, 6.0])], planned)
    assert wide.family.n == max(n, 2)


def test_a_variant_that_diverged_on_more_seeds_than_its_base_is_called_diverged():
    base = [record("adamw", seed, 9.0 + seed) for seed in range(8)]
    ours = [record("dopr-adamw", seed, None if seed < 5 else 1.0 + seed / 9) for seed in range(8)]
    versus = versus_base([*base, *ours])
    assert (versus.verdict, versus.is_strict, versus.wins) == ("diverged", False, "3/8")
    both = [record("adamw", seed, None if seed < 5 else 9.0 + seed) for seed in range(8)]
    assert versus_base([*both, *ours]).verdict == "better"


def test_sections_of_one_task_are_named_after_the_knobs_that_differ():
    rows = [each | {"spec": "task:pdfa,instance=1,states=8,horizon=64"} for each in CLEAR]
    (alone,) = make_sections(rows)
    assert alone.name == "pdfa"
    other = [each | {"spec": "task:pdfa,instance=1,states=9,horizon=64"} for each in CLEAR]
    longer = [each | {"steps": 1500} for each in rows]
    found = [(each.name, each.steps) for each in make_sections([*rows, *other, *longer])]
    names = ("pdfa, states=8", "pdfa, states=9", "pdfa, states=8")
    assert found == [*zip(names, (500, 500, 1500), strict=True)]


def test_the_overview_has_an_entry_for_each_study_that_ran_a_variant():
    lost = [*fresh("adamw", [5.0, 6.0, 7.0]), *fresh("dopr-adamw", [None, None, None])]
    rows = [*lost, *(run | {"task": "nav"} for run in study())]
    found = overview([{"about": section} for section in make_sections(rows)])
    cells = dict(found["rows"])["dopr-adamw"]
    assert [(each.diverged, each.n_runs) for each in cells] == [(0, 3), (3, 3)]
    assert "adamw" not in dict(found["rows"])


def test_the_error_on_the_data_is_named_after_the_metric_that_the_runs_have():
    with_oracle, without = study(), study()
    for run in without:
        if run["grade"]:
            del run["grade"]["metrics"]["val_kl"]
    (section,), (other,) = make_sections(with_oracle), make_sections(without)
    assert "oracle KL" in section.error_on_data
    assert other.error_on_data == "validation loss"
