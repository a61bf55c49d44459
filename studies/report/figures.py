"""Draw the figures of a report: rollouts against validation, curves along a rollout, sweeps."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from studies.report.format import error_unit, metric_label
from studies.report.style import (
    GREY,
    INK,
    STYLE,
    WIDTH,
    Look,
    label,
    legend_on_top,
    log_if_wide,
    logarithmic,
    looks,
    mode_keys,
    panels,
)
from studies.stats.analysis import seed_curves, sweeps
from studies.stats.errors import error_of, primary
from studies.stats.matched import fit_curve
from studies.stats.records import Record, is_finished, is_reported, teacher_forced

CURVES = {  # curve of a grade: label of its axis
    "B": "B(l), accumulated error\n({error})",
    "G": "G(l), feedback gap\n({error} per step)",
    "C": "C(l), accumulated\nKL(model ‖ oracle) ({error})",
    "survival": "S(l), share of episodes\nthat still go on",
    "action_error": "squared error of an action\non own states",
}
ON_DATA = {"B": "A", "survival": "data_survival"}  # the same curves on the data's contexts
MIN_POINTS = 3  # the fewest points of a scatter plot
MAX_RATIO = 100  # of last values; above it, logarithms are averaged over seeds
FLOOR = 1e-3  # a logarithmic axis begins at or above this multiple of the smallest last value


def draw(records: list[Record]) -> dict[str, Figure]:
    """Draw the figures for which the records of one task and training length have data."""
    drawings = {"validation": validation, "curves": curves, "sweeps": learning_rates}
    with rc_context(STYLE):
        found = {name: drawing(records) for name, drawing in drawings.items()}
    return {name: figure for name, figure in found.items() if figure}


def validation(records: list[Record]) -> Figure | None:
    """Draw each run's primary metric against its teacher-forced error, and the fit to bases."""
    runs = [r for r in records if math.isfinite(primary(r) + teacher_forced(r))]
    if len(runs) < MIN_POINTS:
        return None
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    ax, shown = figure.subplots(), looks(records)
    for name, look in shown.items():
        own = [record for record in runs if record["variant"] == name]
        _dots(ax, [r for r in own if not is_reported(r)], look, mfc="none", alpha=0.6)
        _dots(ax, [r for r in own if is_reported(r)], look, mec="white", mew=0.6)
    x, y = fit_curve(records)
    if len(x):
        ax.plot(x, error_of(runs[0]).to_metric(y, runs[0]), color=INK, lw=1.1, label="fit")
    log_if_wide(ax, "x", map(teacher_forced, runs))
    log_if_wide(ax, "y", map(primary, runs))
    has_oracle = "val_kl" in runs[0]["grade"]["metrics"]
    x_label = "oracle KL on the data's contexts, nats" if has_oracle else "validation loss"
    ax.set(xlabel=x_label, ylabel=metric_label(records[0]["primary"]))
    handles = _kinds(shown, runs, fit=len(x) > 0)
    figure.legend(handles=handles, loc="outside right upper", borderpad=0, labelspacing=0.7)
    return figure


def _dots(ax: Axes, runs: list[Record], look: Look, **style) -> None:
    x, y = [*map(teacher_forced, runs)], [*map(primary, runs)]
    ax.plot(x, y, look.marker, color=look.colour, ms=6, label=look.mode, **style)


def _kinds(shown: dict[str, Look], runs: list[Record], *, fit: bool) -> list[Line2D]:
    """Return the legend entries: colours of bases, markers of modes, hollow markers, the fit."""
    dot = {"ls": "none", "marker": "o", "ms": 6}
    colours = {look.base: look.colour for look in shown.values()}
    kinds = [Line2D([], [], color=c, lw=5, label=base) for base, c in colours.items()]
    kinds += mode_keys(shown.values(), by="marker")
    if not all(map(is_reported, runs)):
        kinds.append(Line2D([], [], color=GREY, mfc="none", label="hollow: not reported", **dot))
    return kinds + ([Line2D([], [], color=INK, lw=1.1, label="fit over base runs")] if fit else [])


def curves(records: list[Record]) -> Figure | None:
    """Draw each of CURVES in a row and each base in a column, with bands.

    Thin lines show the same curves on the data's contexts.
    """
    finished = [record for record in records if is_finished(record)]
    found = {name: _bands(finished, name) for name in CURVES}
    names = [name for name in CURVES if found[name]]
    if not names:
        return None
    shown = {name: look for name, look in looks(finished).items() if name in found[names[0]]}
    figure, axes = panels(names, shown.values())
    stride = finished[0]["grade"].get("stride", 1)  # steps between two points
    thin = {n: _bands(finished, ON_DATA[n], like=n) if n in ON_DATA else {} for n in names}
    for name in names:
        for variant, look in shown.items():
            if variant in found[name]:
                _draw_band(axes[name, look.base], *found[name][variant], look=look, stride=stride)
            if variant in thin[name]:
                _line(axes[name, look.base], thin[name][variant][0], look, lw=0.7, stride=stride)
        last = [_last(mean) for mean, _, _ in found[name].values()]
        ax = axes[name, next(iter(shown.values())).base]  # all columns share its scale
        log_if_wide(ax, "y", last)
        if ax.get_yscale() == "log":
            drawn = np.concatenate([mean for mean, _, _ in found[name].values()])
            ax.set_ylim(bottom=max(FLOOR * np.nanmin(last), 0.5 * drawn[drawn > 0].min()))
    unit = error_unit(finished[0]["grade"]["metrics"])
    label(axes, "rollout step l", {name: CURVES[name].format(error=unit) for name in names})
    thin_key = Line2D([], [], color=INK, lw=0.7, label="thin: on the data's contexts")
    more = [thin_key] if any(thin.values()) else []
    legend_on_top(figure, mode_keys(shown.values(), by="dashes") + more)
    return figure


def _bands(records: list[Record], name: str, like: str | None = None) -> dict:
    """Return `seed_curves`, averaging logarithms if the curves end more than MAX_RATIO apart.

    An optimizer with a run that ends at or below zero then keeps its mean and has no interval.

    like: name of the curve whose ends decide. Defaults to `name`.
    """
    found = seed_curves(records, name)
    ends = {_last(mean) for mean, _, _ in seed_curves(records, like or name).values()}
    if not ends or min(ends) <= 0 or max(ends) < MAX_RATIO * min(ends):
        return found
    logs = seed_curves([_logarithm(record, name) for record in records], name)
    bands = {variant: tuple(10**each for each in band) for variant, band in logs.items()}
    empty = {v: (mean, mean * math.nan, mean * math.nan) for v, (mean, _, _) in found.items()}
    return {v: band if _last(band[0]) > 0 else empty[v] for v, band in bands.items()}


def _last(curve: np.ndarray) -> float:
    """Return the last value that is not NaN: there is none after the end of all episodes."""
    known = curve[~np.isnan(curve)]
    return float(known[-1]) if len(known) else math.nan


def _logarithm(record: Record, name: str) -> Record:
    """Return a record with log10 of one curve; NaN where the curve is not positive."""
    if name not in record["grade"]["curves"]:
        return record
    curve = {end: np.array(each, float) for end, each in record["grade"]["curves"][name].items()}
    logs = {end: np.log10(np.where(each > 0, each, np.nan)) for end, each in curve.items()}
    return record | {"grade": {"curves": {name: logs}}}


def _line(ax: Axes, values: np.ndarray, look: Look, lw: float, stride: int) -> None:
    steps = stride * np.arange(1, len(values) + 1)
    ax.plot(steps, values, color=look.colour, lw=lw, ls=look.dashes, label=look.mode)


def _draw_band(
    ax: Axes, mean: np.ndarray, lo: np.ndarray, hi: np.ndarray, *, look: Look, stride: int
) -> None:
    _line(ax, mean, look, lw=1.6, stride=stride)
    if np.isfinite(lo).any():
        steps = stride * np.arange(1, len(mean) + 1)
        ax.fill_between(steps, lo, hi, color=look.colour, alpha=0.14, lw=0)


def learning_rates(records: list[Record]) -> Figure | None:
    """Draw validation loss and primary metric against the learning rate; ring the chosen rate."""
    found = sweeps(records)
    if not found:
        return None
    shown = {name: look for name, look in looks(records).items() if name in found}
    chosen = {record["variant"]: record["lr"] for record in records if record["role"] == "fresh"}
    names = {"val_loss": "validation loss", "primary": metric_label(records[0]["primary"])}
    figure, axes = panels([*names], shown.values())
    for column, name in enumerate(names, start=1):
        for variant, look in shown.items():
            points = [(point[0], point[column]) for point in found[variant]]
            _sweep(axes[name, look.base], points, chosen.get(variant), look)
        values = [point[column] for points in found.values() for point in points]
        log_if_wide(axes[name, look.base], "y", values)
    label(axes, "learning rate", names)
    ring = Line2D([], [], color=INK, ls="none", marker="o", ms=10, mfc="none", label="chosen rate")
    cross = Line2D([], [], color=INK, ls="none", marker="x", label="diverged")
    lost = any(math.isnan(loss) for points in found.values() for _, loss, _ in points)
    more = [ring, cross] if lost else [ring]
    legend_on_top(figure, mode_keys(shown.values(), by="dashes") + more)
    return figure


def _sweep(
    ax: Axes, points: Sequence[tuple[float, float]], chosen: float | None, look: Look
) -> None:
    """Draw one sweep; crosses at the top edge mark rates that diverged."""
    rates, values = zip(*points, strict=True)
    logarithmic(ax, "x", (1, 3))
    ax.plot(rates, values, color=look.colour, ls=look.dashes, lw=1.4, label=look.mode)
    ax.plot(rates, values, look.marker, color=look.colour, ms=4)
    if lost := [lr for lr, value in points if math.isnan(value)]:
        top = {"transform": ax.get_xaxis_transform(), "clip_on": False}
        ax.plot(lost, [0.99] * len(lost), "x", color=look.colour, **top)
    for point in points:
        if point[0] == chosen:
            ax.plot(*point, "o", color=look.colour, ms=10, mfc="none")
