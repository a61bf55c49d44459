"""Draw the figures of the width studies: activations, loss and update size against width."""

import math
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Literal

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from studies.mup.coordinates import KINDS, STEPS
from studies.mup.slopes import widths_of
from studies.mup.transfer import losses_by_width, optimum, shift
from studies.report.style import GREY, INK, STYLE, WIDTH, legend_on_top, logarithmic
from studies.stats.records import Record, grouped

ROW = 2.5  # inches
WORST = 1.5  # an axis of losses ends this many nats above the best loss
NAMES = {"sp": "SP", "mup": "muP"}


def coordinates_figure(records: list[Record]) -> Figure:
    """Draw activations at one rate of one optimizer.

    Rows are parametrisations, columns are kinds of activations, lines are steps t.
    """
    found = grouped(records, itemgetter("parametrisation"))
    with rc_context(STYLE):
        figure, axes = _panels(_known(found), [*KINDS, "logits"], sharey="col")
        colours = _shades(STEPS)
        for (kind, name), ax in axes.items():
            trained = [record for record in found[kind] if record.get("coordinates")]
            for t in STEPS:
                sizes = [(r["width"], r["coordinates"][name][str(t)]) for r in trained]
                _line(ax, sizes, colours[t])
            logarithmic(ax, "y", (1, 3))
        _label(axes, "width", "RMS")
        names = {t: f"change until t = {t}" if t else "activations at t = 0" for t in STEPS}
        legend_on_top(figure, [Line2D([], [], color=colours[t], label=names[t]) for t in STEPS])
    return figure


def transfer_figure(records: list[Record]) -> Figure:
    """Draw loss against rate: parametrisations as rows, optimizers as columns, widths as lines."""
    groups, widths = grouped(records, itemgetter("parametrisation", "variant")), widths_of(records)
    with rc_context(STYLE):
        figure, axes = _grid_of(groups)
        colours, lows = _shades(widths), [math.inf]
        for (kind, variant), ax in axes.items():
            losses = losses_by_width(groups.get((kind, variant), []))
            for width, each in losses.items():
                _valley(ax, each, colours[width])
                lows += each.values()
            _note_shift(ax, losses)
        if math.isfinite(low := min(lows)):
            ax.set_ylim(low - 0.1 * WORST, low + WORST)
        _label(axes, r"$\log_2$ learning rate", "validation loss")
        keys = [Line2D([], [], color=colours[w], label=f"width {w}") for w in widths]
        ring = Line2D([], [], color=INK, ls="none", marker="o", mfc="none", label="fitted optimum")
        legend_on_top(figure, [*keys, ring])
    return figure


def _valley(ax: Axes, losses: dict[float, float], colour: str) -> None:
    known = {math.log2(lr): loss for lr, loss in losses.items() if math.isfinite(loss)}
    ax.plot([*known], [*known.values()], color=colour, marker="o", ms=3, lw=1.3)
    best = optimum(losses) if losses else None
    if best and best.kind != "edge":
        ax.plot(best.log2_lr, best.loss, "o", color=colour, ms=9, mfc="none")


def _note_shift(ax: Axes, losses: dict[int, dict[float, float]]) -> None:
    """Write how far the optimum moves from the narrowest width to the widest, if it is known."""
    optima = {width: optimum(each) for width, each in losses.items() if each}
    if optima and not math.isnan(moved := shift(optima)):
        text = f"optimum moves {moved:+.1f} octaves".replace("-", "−")
        ax.text(0.98, 0.97, text, transform=ax.transAxes, ha="right", va="top", color=INK)


def ratio_figure(records: list[Record]) -> Figure:
    """Draw update size over weight size against width, with rates as lines.

    Rows and columns are those of `transfer_figure`.
    """
    groups = grouped(records, itemgetter("parametrisation", "variant"))
    rates = sorted({record["lr"] for record in records})
    with rc_context(STYLE):
        figure, axes = _grid_of(groups)
        colours = _shades(rates)
        for key, ax in axes.items():
            own = [r for r in groups.get(key, []) if r.get("update_ratio")]
            for lr in sorted({record["lr"] for record in own}):
                sizes = [(r["width"], r["update_ratio"]) for r in own if r["lr"] == lr]
                _line(ax, sizes, colours[lr])
            logarithmic(ax, "y", (1, 3))
        _label(axes, "width", "‖ΔW‖ / ‖W‖")
        labels = {lr: rf"lr $2^{{{math.log2(lr):g}}}$" for lr in rates}
        keys = [Line2D([], [], color=colours[lr], label=labels[lr]) for lr in rates]
        legend_on_top(figure, keys)
    return figure


def _grid_of(groups: dict[tuple[str, str], list[Record]]) -> tuple[Figure, dict]:
    kinds, variants = (list(dict.fromkeys(names)) for names in zip(*groups, strict=True))
    return _panels(_known(kinds), variants, sharey="all")


def _known(kinds: Iterable[str]) -> list[str]:
    """Return the parametrisations among `kinds`, the control first."""
    return [kind for kind in NAMES if kind in {*kinds}]


def _panels(
    rows: Sequence[str], columns: Sequence[str], sharey: Literal["col", "all"]
) -> tuple[Figure, dict]:
    """Return a figure and its titled axes by (row, column); a column shares its x-axis."""
    wide = max(2.2, *(0.1 * len(f"{column}, {NAMES[rows[0]]}") for column in columns))
    size = (max(WIDTH, wide * len(columns)), ROW * len(rows) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    shape = (len(rows), len(columns))
    grid = figure.subplots(*shape, squeeze=False, sharex="col", sharey=sharey)
    axes = {(r, c): grid[i, j] for i, r in enumerate(rows) for j, c in enumerate(columns)}
    for (row, column), ax in axes.items():
        ax.set_title(f"{column}, {NAMES[row]}")
    return figure, axes


def _label(axes: dict, x: str, y: str) -> None:
    """Label the x-axes of the last row and the y-axes of the first column."""
    for ax in axes.values():
        spec = ax.get_subplotspec()
        ax.set_xlabel(x if spec.is_last_row() else "")
        ax.set_ylabel(y if spec.is_first_col() else "")


def _line(ax: Axes, points: Iterable[tuple[int, float | None]], colour: str) -> None:
    """Draw the geometric mean over seeds against width, and a dot for each seed.

    Missing values are left out.
    """
    sizes: dict[int, list[float]] = {}
    for width, value in points:
        if value:  # it has a logarithm
            sizes.setdefault(width, []).append(value)
    means = {width: math.exp(np.mean(np.log(sizes[width]))) for width in sorted(sizes)}
    if not means:
        return
    ax.plot([*means], [*means.values()], color=colour, lw=1.3)
    for width, values in sizes.items():
        ax.plot([width] * len(values), values, ".", color=colour, ms=3)
    ax.set_xscale("log", base=2)
    ax.set_xticks([*means], [str(width) for width in means], color=GREY)


def _shades(keys: Sequence) -> dict:
    """Return a colour for each key, from dark to light."""
    shades = colormaps["viridis"](np.linspace(0, 0.85, len(keys)))
    return {key: tuple(map(float, shade)) for key, shade in zip(keys, shades, strict=True)}
