"""Define the style of the figures of a report, and the axes that they share.

The colour shows the base optimizer; the marker and the dashes show the mode (no DoPr, DoPr, fast
DoPr, a changed setting). Figures are `Figure` objects without pyplot, so that importing this module
does not choose a backend and figures are freed.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from studies.report.format import MODES, mode_of
from studies.stats.records import Record

COLOURS = {  # after Okabe and Ito (2008), distinct for colour-blind readers
    "adamw": "#0072B2",
    "muon": "#D55E00",
    "signum": "#009E73",
    "adamuon": "#B0578D",
    "sgd": "#C08A00",
}
SPARE = ("#3A9BD9", "#222222", "#808080")  # for other optimizers
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "p", "h", "<", ">", "8")
ON_OFF = ((4, 1.6), (), (1, 1.1), (6, 1.4, 1, 1.4), (2, 1, 1, 1, 1, 1), (9, 2), (1, 3))  # points
DASHES = tuple((0, each) for each in ON_OFF)
INK, GREY = "#1f2328", "#8c959f"
WIDTH, HEIGHT = 9.6, 2.7  # width of a figure and height of a panel in inches
WIDE = 5  # the ratio of values above which an axis is logarithmic
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "grid.color": "#e7eaee",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.ymargin": 0.08,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.hashsalt": "report",  # the same records, the same bytes
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Look:
    """The style of one variant."""

    base: str
    mode: str
    colour: str
    marker: str
    dashes: tuple


def looks(records: Iterable[Record]) -> dict[str, Look]:
    """Return {variant: style}, ordered by base and mode; a base has one colour in all reports."""
    bases = {record["variant"]: record["base"] for record in records}
    modes = {name: mode_of(name, base) for name, base in bases.items()}
    new = sorted({*bases.values()} - COLOURS.keys())
    colours = COLOURS | {base: SPARE[i % len(SPARE)] for i, base in enumerate(new)}
    columns = [*colours]
    order = [*MODES.values(), *sorted({*modes.values()} - {*MODES.values()})]
    found = {}
    for name in sorted(bases, key=lambda v: (columns.index(bases[v]), order.index(modes[v]))):
        base, number = bases[name], order.index(modes[name])
        marker, dashes = MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)]
        found[name] = Look(base, modes[name], colours[base], marker, dashes)
    return found


def panels(names: Sequence[str], looks: Iterable[Look]) -> tuple[Figure, dict]:
    """Return a figure and its axes by (name, base).

    Each name is a row with a shared y-axis and each base is a column. If there is only one base,
    the names are side by side.
    """
    columns = {look.base: look.colour for look in looks}
    shape = (len(names), len(columns)) if len(columns) > 1 else (1, len(names))
    figure = Figure(figsize=(WIDTH, HEIGHT * shape[0] + 0.4), layout="constrained")
    grid = figure.subplots(*shape, squeeze=False, sharey="row" if len(columns) > 1 else False)
    keys = [(name, base) for name in names for base in columns]
    axes = dict(zip(keys, grid.flat, strict=True))
    for (name, base), ax in axes.items():
        if name == names[0] or len(columns) == 1:
            ax.set_title(base, color=columns[base])
    return figure, axes


def label(axes: dict, x: str, y: dict[str, str]) -> None:
    """Label the axes of `panels`: x in the last row, y in the first column.

    y: {name of the row: label}.
    """
    for (name, _), ax in axes.items():
        spec = ax.get_subplotspec()
        if spec.is_last_row():
            ax.set_xlabel(x)
        if spec.is_first_col() or len({base for _, base in axes}) == 1:
            ax.set_ylabel(y[name])


def log_if_wide(ax: Axes, axis: str, values: Iterable[float]) -> None:
    """Make an axis logarithmic if the finite values are positive and far apart."""
    known = np.array([value for value in values if np.isfinite(value)])
    if len(known) and known.min() > 0 and known.max() / known.min() >= WIDE:
        logarithmic(ax, axis, (1, 2, 5) if known.max() / known.min() < 1e3 else (1,))


def logarithmic(ax: Axes, axis: str, ticks: tuple[int, ...]) -> None:
    """Make an axis logarithmic, with plain numbers at these multiples of the powers of ten."""
    ax.set(**{f"{axis}scale": "log"})
    which = {"x": ax.xaxis, "y": ax.yaxis}[axis]
    which.set_major_locator(LogLocator(subs=ticks))
    which.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    which.set_minor_locator(NullLocator())


def _tick(value: float) -> str:
    """Format a tick: 0.001 to 9999 as a plain number, others as 2e-5."""
    power = 0 if 1e-3 <= value < 1e4 else math.floor(math.log10(value) + 1e-9)
    return f"{value / 10**power:g}" + (f"e{power}" if power else "")


def mode_keys(looks: Iterable[Look], *, by: str) -> list[Line2D]:
    """Return the legend entries of the modes, by their markers or by their dashes."""
    handles = []
    for mode, look in {look.mode: look for look in looks}.items():
        style: dict[str, Any] = {"ls": look.dashes}
        if by == "marker":
            style = {"marker": look.marker, "ls": "none"}
        handles.append(Line2D([], [], color=INK, lw=1.6, ms=6, label=mode, **style))
    return handles


def legend_on_top(figure: Figure, handles: Sequence[Line2D]) -> None:
    figure.legend(handles=handles, loc="outside upper left", ncols=6, borderpad=0)


def svg(figure: Figure) -> str:
    """Return the figure as SVG whose text uses the fonts of the reader's system."""
    buffer = BytesIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().decode().replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")


def save_png(figure: Figure, path: Path) -> None:
    with rc_context(STYLE):
        figure.savefig(path, dpi=160, metadata={"Software": None})
