"""Test that the figure shows the losses of every rule and the measurements of exact mode."""

import pytest

from studies.fresh_mean.figure import LABELS, draw
from studies.fresh_mean.interventions import RULES
from studies.fresh_mean.why import table_of


def rows():
    keys = ("mean_share", "gradient_share", "suppression", "turn", "turn_10", "leak", "leak_10")
    measured = [
        {"step": step, "layer": layer} | dict.fromkeys(keys, 2.0 + layer)
        for step in (9, 19)
        for layer in (0, 1)
    ]
    return [
        {"rule": rule, "lr": 0.016, "losses": [4.0 + i, 4.1], "measured": measured}
        for i, rule in enumerate(["base", *RULES])
    ]


def test_every_rule_is_in_the_figure_and_in_the_table():
    assert LABELS.keys() == RULES.keys()
    left, middle, right = draw(rows()).axes
    shown = {float(line.get_xdata()[0]) for line in left.lines if line.get_marker() == "o"}
    assert shown == {4.0 + i for i in range(len(RULES) + 1)}
    assert [len(ax.lines) for ax in (middle, right)] == [3, 2]
    assert right.lines[0].get_ydata() == pytest.approx([2.5, 2.5])  # the median of two layers
    assert table_of(rows()).count("0.016") == len(RULES) + 1
