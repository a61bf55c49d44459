"""Plot the share that DoPr adds to a step: optimizers in rows, placements in columns."""

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.scale.step import StepEstimate
from studies.report.style import DASHES, HEIGHT, INK, STYLE, WIDTH, logarithmic

COLOURS = (
    "#41347b",
    "#31688e",
    "#1f9e89",
    "#7fb52c",
    "#d9a400",
)  # from small to large models, based on viridis
LINES = {"exact": DASHES[1], "sampled": DASHES[2], "fresh mean": DASHES[0]}
TITLES = {"ddp": "DDP", "fsdp": "FSDP2", "hsdp": "HSDP, 8 GPUs a copy"}
TICKS = (1, 8, 64, 512, 4096)


def draw(estimates: list[StepEstimate]) -> Figure:
    """Plot the points at which a model fits without DoPr, hollow if it does not fit with DoPr."""
    bases = list(dict.fromkeys(each.base for each in estimates))
    placements = list(dict.fromkeys(each.placement.parallel for each in estimates))
    shapes = list(dict.fromkeys(each.shape for each in estimates))
    colours = {shape: COLOURS[i % len(COLOURS)] for i, shape in enumerate(shapes)}
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT * len(bases) + 0.7), layout="constrained")
        grid = figure.subplots(len(bases), len(placements), squeeze=False, sharex=True, sharey=True)
        for base, row in zip(bases, grid, strict=True):
            for parallel, ax in zip(placements, row, strict=True):
                panel = [e for e in estimates if (e.base, e.placement.parallel) == (base, parallel)]
                lines(ax, panel, colours)
                ax.set_title(f"{base}, {TITLES[parallel]}")
        for ax in grid[-1]:
            ax.set_xlabel("GPUs")
        for ax in grid[:, 0]:
            ax.set_ylabel("DoPr adds,\n% of the step without it")
        options = {"loc": "outside upper left", "ncols": 9, "columnspacing": 1.4, "borderpad": 0}
        figure.legend(handles=legend_handles(colours), **options)
    return figure


def lines(ax: Axes, panel: list[StepEstimate], colours: dict[str, str]) -> None:
    """Draw one line for each model and mode."""
    logarithmic(ax, "y", (1,))
    ax.set_xscale("log", base=2)
    ax.set_xticks(TICKS, [str(tick) for tick in TICKS])
    ax.axhline(100, color=INK, lw=0.7)
    for shape, mode in dict.fromkeys((each.shape, each.mode) for each in panel):
        own = [e for e in panel if (e.shape, e.mode) == (shape, mode) and e.fits != "no"]
        x, y = [e.placement.size for e in own], [100 * e.added for e in own]
        ax.plot(x, y, color=colours[shape], ls=LINES[mode], lw=1.3)
        for e, size, value in zip(own, x, y, strict=True):
            face = colours[shape] if e.fits == "yes" else "white"
            ax.plot(size, value, "o", ms=4.5, color=colours[shape], mfc=face)


def legend_handles(colours: dict[str, str]) -> list[Line2D]:
    sizes = [Line2D([], [], color=c, lw=5, label=shape) for shape, c in colours.items()]
    modes = [Line2D([], [], color=INK, ls=ls, label=mode) for mode, ls in LINES.items()]
    dot = {"color": INK, "ls": "none", "marker": "o", "ms": 4.5}
    hollow = Line2D([], [], mfc="white", label="memory too small with DoPr", **dot)
    return [*sizes, *modes, hollow]
