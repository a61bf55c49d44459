"""Test that effects are paired by seed and verdicts follow the rule of the protocol."""

import numpy as np
import pytest

from studies.dagger.comparison import CLONING, DAGGER, METHODS, METRICS, Setup
from studies.dagger.tables import effects, tables_of, verdict

SETUPS = [
    Setup("ctrl", variant, method) for variant in ("muon", "fast-dopr-muon") for method in METHODS
]
BOTH = SETUPS[-1]
SEEDS = np.array([0.0, 1.0, 5.0, 2.0, 7.0])  # differences between seeds, which pairing removes
NOISE = np.array([[1, -1, 0, 2, -2], [0, 1, -1, -2, 2], [-1, 2, 0, 1, -2], [2, 0, -1, -2, 1]]) / 50


def errors(*means):
    """Return log errors with these means over seeds: cloning and DAgger, then both with DoPr."""
    return {
        setup: mean + SEEDS + noise for setup, mean, noise in zip(SETUPS, means, NOISE, strict=True)
    }


def test_effects_are_differences_within_seeds():
    found = effects(errors(10, 7, 6, 5) | {Setup("nav", "muon", DAGGER): SEEDS}, BOTH)
    assert found.dagger == pytest.approx(5 - 6 + NOISE[3] - NOISE[2])
    assert found.dopr == pytest.approx(5 - 7 + NOISE[3] - NOISE[1])
    assert found.interaction == pytest.approx(
        (5 - 7) - (6 - 10) + NOISE[[0, 3]].sum(0) - NOISE[[1, 2]].sum(0)
    )


def test_an_effect_without_its_combination_is_empty():
    values = errors(10, 7, 6, 5)
    assert [len(each) for each in vars(effects(values, SETUPS[0])).values()] == [0, 0, 0]
    assert [len(each) for each in vars(effects(values, SETUPS[1])).values()] == [5, 0, 0]
    assert [len(each) for each in vars(effects(values, SETUPS[2])).values()] == [0, 5, 0]
    del values[SETUPS[0]]
    assert [len(each) for each in vars(effects(values, BOTH)).values()] == [5, 5, 0]


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ((10, 7, 8, 5), "adds up"),
        ((10, 7, 8, 3), "adds up"),  # together more than the sum
        ((10, 7, 8, 6), "adds up in part"),
        ((10, 7, 8, 7), "DoPr replaced"),
        ((10, 8, 7, 7), "DAgger replaced"),
        ((10, 7, 7, 7), "DAgger and DoPr replaced"),
        ((10, 7, 10, 5), "no gain of DoPr alone"),
        ((10, 11, 8, 5), "no gain of DAgger alone"),
        ((10, 10, 10, 5), "no gain of DAgger or DoPr alone"),
    ],
)
def test_the_verdict_follows_the_rule_of_the_protocol(means, expected):
    assert verdict(errors(*means), BOTH) == expected


def test_a_noisy_interaction_is_undecided():
    values = errors(10, 9.5, 9.5, 9.25)
    values[BOTH] = values[BOTH] + 10 * NOISE[0]
    assert verdict(values, BOTH) == "undecided"


def rows(values):
    """Return rows with these log errors, and a tenth of them as failures."""
    other = {key: [0.1, 0.2, 0.3, 0.4, 0.5] for key in ("val_loss", *METRICS["ctrl"])}
    return [
        vars(setup)
        | {"lr": 0.01, **other, "log_error": log.tolist(), "failure": (log / 10).tolist()}
        for setup, log in values.items()
    ]


def test_tables_show_plain_effects_and_ratios():
    same = dict.fromkeys(SETUPS, np.log([0.2] * 5))
    same |= {SETUPS[1]: np.log([0.1] * 5), SETUPS[2]: np.log([0.1] * 5), BOTH: np.log([0.1] * 5)}
    lines = tables_of(rows(same)).splitlines()
    assert lines[0] == "ctrl: failure"
    ratios = [line for line in lines if "fast-dopr-muon` | DAgger" in line][1]
    assert ratios.endswith(
        "| 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] | 2.00 [2.00, 2.00] | DAgger and DoPr replaced |"
    )
    plain = next(line for line in lines if "`muon` | DAgger" in line)
    assert plain.endswith("| -0.230 ± 0.000 | -0.069 ± 0.000 |  |  |")


def test_a_row_with_a_diverged_run_has_no_verdict():
    values = errors(10, 7, 8, 5)
    values[SETUPS[0]][2] = np.nan
    text = tables_of(rows(values))
    assert "adds up" not in text
    assert "no gain" not in text
    assert CLONING in text
