"""Write the tables and the figure of the board from the records that studies.submit added to it.

    python -m studies.board.page [--board studies/results/board] [--figure docs/board.png]

A table for each task, of the published and of the hidden seeds: the rollout error with DoPr over
that without, each at its own learning rate and at equal rates, with 95 % intervals over seeds; for
a metric that is better if higher, such as the return, also its own ratio. The figure shows the
rollout error against the time of a step; an arrow leads from an optimizer alone to the same with
DoPr. bench.board_costs measures the times, which are the same for all language tasks.
"""

import math
import sys
from operator import itemgetter
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from data.files import write_atomic
from eval.command import command_parser
from eval.tables import markdown
from studies.board.stages import TASKS
from studies.humanoid.tables import difference
from studies.humanoid.task import Humanoid
from studies.report.format import number, times
from studies.report.style import GREY, INK, STYLE, save_png
from studies.rollout.results import plain, ratio
from studies.rows import load_rows
from studies.stats.analysis import LeaderboardRow, leaderboard
from studies.stats.errors import error_of_metric, primary
from studies.stats.records import (
    RECORDS,
    AnalysisError,
    Record,
    by_variant,
    is_reported,
    read_records,
)
from studies.submit.repeat import HIDDEN
from studies.sweep.variants import FAST_PREFIX

COSTS = Path("bench/results")
CLONES_COSTS, LANGUAGE_COSTS = "board_costs_humanoid.json", "board_costs.json"
LABEL_GAP = 0.055  # between two names beside a panel, as a share of its height
FILES = (RECORDS, HIDDEN)  # of the published and of the hidden seeds
Board = dict[str, dict[str, list[Record]]]  # {task: {name of the file: records}}
Costs = dict[str, dict[str, float]]  # {variant: {"ms": time of a step, "MiB": its state}}


def boards(place: Path) -> Board:
    """Return the records of the tasks that have any."""
    found = {task: {name: read_records(place / task / name) for name in FILES} for task in TASKS}
    return {task: records for task, records in found.items() if records[RECORDS]}


def costs_of(board: Board, folder: Path) -> dict[str, Costs]:
    """Return the costs of the variants of each task.

    Raises AnalysisError if the file of a task has none.
    """
    found = {}
    for task in board:
        path = folder / (CLONES_COSTS if task == Humanoid.name else LANGUAGE_COSTS)
        found[task] = load_rows(path, itemgetter("variant"))
        if not found[task]:
            raise AnalysisError(f"{path} has no costs; run bench.board_costs")
    return found


def tables(board: Board, costs: dict[str, Costs]) -> str:
    """Return the tables of all tasks in Markdown."""
    parts = ["# The board", "", "Written by `python -m studies.board.page`.", ""]
    for task, records in board.items():
        parts += [f"## {task}", "", task_table(records, costs[task]), ""]
    return "\n".join(parts)


def task_table(records: dict[str, list[Record]], costs: Costs) -> str:
    """Return a row for each optimizer without DoPr, with the gain that DoPr brings."""
    published, hidden = (_rows(records[name]) for name in FILES)
    metric, error = _metric_and_error(records[RECORDS])
    header = ["optimizer", "rate", f"{metric} alone", "with DoPr"]
    header += [f"{error}, DoPr / alone, own rates", "equal rates", "hidden seeds"]
    header += [f"{metric}, DoPr / alone", "hidden seeds"] if metric != error else []
    header += ["ms a step", "with DoPr", "state, MiB", "with DoPr"]
    lines = []
    for name, row in published.items():
        if row.variant != row.base or not (pair := published.get(FAST_PREFIX + name)):
            continue
        again = hidden.get(FAST_PREFIX + name)
        lines.append(
            [
                *(name, f"{row.lr:g}, {pair.lr:g}"),
                *(number(each.primary.mean) for each in (row, pair)),
                *map(ratio, (pair.versus_base, pair.at_this_rate)),
                ratio(again.versus_base if again else None),
                *(_metric_ratio(records[file], name) for file in FILES if metric != error),
                *(
                    number(costs[each][key]) if each in costs else ""
                    for key in ("ms", "MiB")
                    for each in (name, FAST_PREFIX + name)
                ),
            ]
        )
    return markdown(header, lines)


def _rows(records: list[Record]) -> dict[str, LeaderboardRow]:
    return {row.variant: row for row in leaderboard(records)}


def _metric_and_error(records: list[Record]) -> tuple[str, str]:
    """Return the names of the metric that ranks and of the rollout error: equal if lower is better.

    See studies/stats/errors.py.
    """
    metric, higher = records[0]["primary"], records[0]["higher_is_better"]
    error = error_of_metric(metric, higher_is_better=higher)
    return metric, (error.formula(metric) or metric) if error.source == metric else error.source


def _metric_ratio(records: list[Record], name: str) -> str:
    """Return the ratio of the metric with DoPr to that without, a geometric mean over seeds."""
    fresh = by_variant(filter(is_reported, records))
    own, others = fresh.get(FAST_PREFIX + name, []), fresh.get(name, [])
    return plain(times(difference(own, others, lambda record: math.log(primary(record)))))


def draw(board: Board, costs: dict[str, Costs]) -> Figure:
    """Draw a panel for each task: rollout error against the time of a step."""
    with rc_context(STYLE):
        figure = Figure(figsize=(4.8 * len(board), 3.6), layout="constrained")
        panels = figure.subplots(1, len(board), squeeze=False)[0]
        for ax, (task, records) in zip(panels, board.items(), strict=True):
            _panel(ax, task, records[RECORDS], costs[task])
        return figure


def _panel(ax: Axes, task: str, records: list[Record], costs: Costs) -> None:
    rows = _rows(records)
    ends = {}  # {optimizer: time of a step and rollout error with DoPr}
    for name, row in rows.items():
        pair = rows.get(FAST_PREFIX + name)
        if pair is None or name not in costs:
            continue
        x = [costs[each]["ms"] for each in (name, FAST_PREFIX + name)]
        y = [math.exp(each.mean_log_error) for each in (row, pair)]
        ax.annotate("", (x[1], y[1]), (x[0], y[0]), arrowprops={"arrowstyle": "->", "color": GREY})
        ax.plot(x[:1], y[:1], "o", color=GREY, ms=4)
        ax.plot(x[1:], y[1:], "o", color=INK, ms=4)
        ends[name.split("+")[0]] = x[1], y[1]
    _, error = _metric_and_error(records)
    ax.set_title(task)
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    ax.set_xlabel("milliseconds a step")
    ax.set_ylabel(f"rollout error ({error}), lower is better")
    ax.margins(0.12)
    _label(ax, ends)


def _label(ax: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Write names beside the panel in the order of their points' heights, each with a thin line."""
    names = sorted(points, key=lambda name: points[name][1])
    height_of = ax.transData + ax.transAxes.inverted()
    heights = [float(height_of.transform(points[name])[1]) for name in names]
    for i in range(1, len(names)):
        heights[i] = max(heights[i], heights[i - 1] + LABEL_GAP)
    excess = max(0.0, heights[-1] - 1) if heights else 0.0
    for name, height in zip(names, heights, strict=True):
        ax.annotate(
            name,
            *(points[name], (1.03, height - excess)),
            textcoords="axes fraction",
            va="center",
            fontsize=7,
            arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.4, "relpos": (0, 0.5)},
            annotation_clip=False,
        )


def main(argv: list[str]) -> None:
    parser = command_parser("studies.board.page", __doc__)
    parser.add_argument("--board", type=Path, default=Path("studies/results/board"))
    parser.add_argument("--costs", type=Path, default=COSTS)
    parser.add_argument("--figure", type=Path, default=Path("docs/board.png"))
    arguments = parser.parse_args(argv)
    try:
        board = boards(arguments.board)
        if not board:
            raise AnalysisError(
                f"{arguments.board} contains no records; add some by studies.submit"
            )
        costs = costs_of(board, arguments.costs)
        write_atomic(arguments.board / "tables.md", tables(board, costs))
        save_png(draw(board, costs), arguments.figure)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{arguments.board / 'tables.md'}\n{arguments.figure}")


if __name__ == "__main__":
    main(sys.argv[1:])
