"""Draw why the mean must be fresh, from the results of why.py.

    python -m studies.fresh_mean.figure [--out docs/fresh_mean.png]

Left, the final validation loss of each rule, one point per seed. Middle, the angle between the mean
of a step and that of one or nine steps before, and the angle 1/s beyond which an old mean does not
suppress. Right, how much more of the gradient along the mean passes because the mean is old. Lines
are medians over the layers of a run in exact mode, and bands hold all layers.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.command import command_parser
from studies.optimizer_table import ROOT
from studies.report.style import COLOURS, GREY, INK, STYLE, logarithmic, save_png

RESULTS = ROOT / "studies" / "results" / "fresh_mean_why.json"
BLUE, RED = COLOURS["adamw"], COLOURS["muon"]
LABELS = {  # rule: its label in the figure, and its colour
    "base": ("AdamW, at this rate", INK),
    "exact": ("exact mode", BLUE),
    "averaged C": ("fresh mean, averaged C", BLUE),
    "mean alone": ("mean alone, no C", BLUE),
    "mean removed": ("G without its part along μ", BLUE),
    "rotated 1": ("exact, μ rotated by 1°", GREY),
    "rotated 3": ("3°", GREY),
    "rotated 10": ("10°", GREY),
    "rotated 30": ("30°", GREY),
    "averaged mean": ("averaged mean, own C", RED),
    "stale mean": ("exact, μ one step old", RED),
    "stale mean removed": ("G without the old μ", RED),
    "no mean": ("C alone, no mean", RED),
}


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Draw the three panels."""
    by_rule = {row["rule"]: row for row in rows}
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.1), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
        _losses(left, rows)
        measured = by_rule["exact"]["measured"]
        threshold = [
            each | {"threshold": math.degrees(1 / each["suppression"])} for each in measured
        ]
        _over_steps(middle, threshold, {"turn": "1 step", "turn_10": "9 steps"}, "degrees")
        _line(middle, threshold, "threshold", INK, "1/s")
        _over_steps(right, measured, {"leak": "1 step", "leak_10": "9 steps"}, "times as much")
        left.set_title("One part of DoPr at a time")
        middle.set_title("Angle between means")
        right.set_title("What an old mean lets through")
        for ax in (middle, right):
            ax.legend(fontsize=7)
        return figure


def _losses(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Draw one line of points per rule. The first row is AdamW at its own rate."""
    order = [rows[0], *sorted(rows[1:], key=lambda row: [*LABELS].index(row["rule"]))]
    labels = ["AdamW, at its own rate", *(label for label, _ in LABELS.values())]
    for y, row in enumerate(order):
        losses, colour = row["losses"], LABELS[row["rule"]][1]
        ax.plot(losses, [y] * len(losses), "o", color=colour, ms=4)
        ax.plot(np.mean(losses), y, "|", color=colour, ms=13)
    ax.set_yticks(range(len(order)), labels)
    ax.invert_yaxis()
    ax.set_xlabel("validation loss")


def _over_steps(
    ax: Axes, measured: list[dict[str, Any]], names: dict[str, str], label: str
) -> None:
    """Draw the course of some measurements over the training."""
    for (key, name), colour in zip(names.items(), (RED, GREY), strict=True):
        _line(ax, measured, key, colour, name)
    logarithmic(ax, "y", (1,))
    ax.set(xlabel="step", ylabel=label)


def _line(ax: Axes, measured: list[dict[str, Any]], key: str, colour: str, name: str) -> None:
    """Draw the median over layers, and a band that holds all layers."""
    steps = sorted({row["step"] for row in measured})
    values = np.array([[row[key] for row in measured if row["step"] == step] for step in steps])
    ax.plot(steps, np.median(values, 1), color=colour, label=name)
    ax.fill_between(steps, values.min(1), values.max(1), color=colour, alpha=0.15, lw=0)


def main(argv: list[str]) -> None:
    parser = command_parser("studies.fresh_mean.figure", __doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/fresh_mean.png"))
    arguments = parser.parse_args(argv)
    save_png(draw(json.loads(RESULTS.read_text())["rows"]), arguments.out)


if __name__ == "__main__":
    main(sys.argv[1:])
