"""Draw the ratios of the rollout study: a panel for each task and length, a line for each variant.

    python -m studies.rollout.figure [--out studies/results/rollout/ratios.png]

Markers show the rollout error with DoPr as a multiple of the base's error. For filled markers each
optimizer has its own learning rate; for hollow ones the base has the variant's. Intervals are 95 %
over seeds, stars as in studies/rollout/tables.py.
"""

import math
import sys
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from eval.command import command_parser
from studies.report.sections import Section
from studies.report.style import (
    GREY,
    INK,
    STYLE,
    WIDTH,
    Look,
    legend_on_top,
    logarithmic,
    looks,
    save_png,
)
from studies.rollout.results import GROUPS, RESULTS, place, sections_of
from studies.stats.analysis import Compared, leaderboard
from studies.stats.records import AnalysisError

LENGTHS = ("500 steps", "1,500 steps")  # keys of GROUPS
LINE, MARGINS = 0.3, 0.8  # inches per variant, and around a panel
OFFSET = 0.17  # of the two ratios of a variant from its line, in lines
KEYS = {"each at its own learning rate": INK, "the base at the variant's rate": "white"}


def forest(results: Path = RESULTS) -> Figure:
    """Draw a row of panels for each length that has records, a column for each task.

    Raises AnalysisError if there are no records or if they do not belong together.
    """
    rows = [sections_of(GROUPS[length], results) for length in LENGTHS]
    rows = [row for row in rows if _variants(row)]
    if not rows:
        raise AnalysisError(
            f"{results}: nothing to compare; run `python -m studies.rollout.all_stages`"
        )
    with rc_context(STYLE):
        return _draw(rows)


def _draw(rows: list[list[Section]]) -> Figure:
    names = [_variants(row) for row in rows]
    tasks = list(dict.fromkeys(section.task for row in rows for section in row))
    heights = [LINE * len(each) + MARGINS for each in names]
    figure = Figure(figsize=(WIDTH, sum(heights) + MARGINS / 2), layout="constrained")
    grid = figure.subplots(
        len(rows), len(tasks), squeeze=False, sharex="col", sharey="row", height_ratios=heights
    )
    for row, axes, lines in zip(rows, grid, names, strict=True):
        _row(row, dict(zip(tasks, axes, strict=True)), lines)
    for column in grid.T:
        [ax for ax in column if ax.get_visible()][-1].tick_params(labelbottom=True)
    figure.supxlabel("rollout error with DoPr / without", fontsize=9)
    handles = [
        Line2D([], [], ls="none", marker="o", color=INK, mfc=fill, label=text)
        for text, fill in KEYS.items()
    ]
    legend_on_top(figure, handles)
    return figure


def _variants(sections: list[Section]) -> list[str]:
    """Return the variants that are compared with a base, in the order of the study."""
    names = {e.variant for section in sections for e in section.entries if e.variant != e.base}
    return sorted(names, key=place)


def _row(row: list[Section], axes: dict[str, Axes], names: list[str]) -> None:
    """Draw the panels of a row; the names are left of the first visible panel."""
    by_task = {section.task: section for section in row}
    shown = looks(record for section in row for record in section.records)
    for task, ax in axes.items():
        ax.set_visible(task in by_task)
        if task in by_task:
            _panel(ax, by_task[task], names, shown)
    first = next(ax for ax in axes.values() if ax.get_visible())
    first.tick_params(labelleft=True)
    for tick, name in zip(first.get_yticklabels(), names, strict=True):
        tick.set_color(shown[name].colour)


def _panel(ax: Axes, section: Section, names: list[str], shown: dict[str, Look]) -> None:
    strict = {e.variant for e in section.entries if e.versus and e.versus.is_strict}
    for row in leaderboard(section.records):
        if row.variant in names:
            y, look = names.index(row.variant), shown[row.variant]
            _interval(ax, y + OFFSET, row.at_this_rate, look, mfc="white", alpha=0.7)
            _interval(ax, y - OFFSET, row.versus_base, look, mfc=look.colour)
            if row.variant in strict and row.versus_base:
                at = math.exp(row.versus_base.difference.hi), y - OFFSET
                ax.annotate("*", at, (4, -5), textcoords="offset points", fontsize=11)
    ax.axvline(1, color=GREY, lw=1, zorder=0)
    logarithmic(ax, "x", (1, 2, 3, 5, 7))
    ax.set_title(f"{section.name}, {section.steps:,} steps")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)


def _interval(ax: Axes, y: float, versus: Compared | None, look: Look, **style: Any) -> None:
    if versus is None or not math.isfinite(versus.difference.lo):
        return
    found = versus.difference
    lo, mean, hi = map(math.exp, (found.lo, found.mean, found.hi))
    ax.plot([lo, hi], [y, y], color=look.colour, lw=1.2, alpha=0.7)
    ax.plot([mean], [y], ls="none", marker=look.marker, color=look.colour, ms=5, **style)


def main(argv: list[str]) -> None:
    parser = command_parser("studies.rollout.figure", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the stages")
    parser.add_argument("--out", type=Path, default=RESULTS / "ratios.png", help="a PNG file")
    arguments = parser.parse_args(argv)
    try:
        figure = forest(arguments.results)
    except AnalysisError as error:
        parser.exit(2, f"error: {error}\n")
    save_png(figure, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main(sys.argv[1:])
