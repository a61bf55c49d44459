"""Draw the distance from the features over steps and over the loss, at the largest condition."""

from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from studies.report.style import COLOURS, DASHES, INK, STYLE, WIDTH, legend_on_top, logarithmic

LABELS = {"base": ("without DoPr", DASHES[0]), "exact": ("DoPr, exact mode", DASHES[1])}


def draw(result: dict[str, Any]) -> Figure:
    """Draw a column for each noise and length: above over steps, below over the loss.

    Lines are geometric means over the seeds that did not diverge.
    """
    rows = [row for row in result["rows"] if row["mode"] in LABELS]
    condition = max(row["condition"] for row in rows)
    columns = sorted({(row["noise"], row["steps"]) for row in rows})
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
        grid = figure.subplots(2, len(columns), squeeze=False, sharey="col")
        for (noise, steps), (above, below) in zip(columns, grid.T, strict=True):
            setup = (noise, condition, steps)
            own = [row for row in rows if (row["noise"], row["condition"], row["steps"]) == setup]
            _column(above, below, own, result["run"]["record_every"])
            above.set_title(f"noise {noise:g}, {steps} steps")
        for ax in grid[:, 0]:
            ax.set_ylabel("distance from the features")
        legend_on_top(figure, _legend([row["optimizer"] for row in rows]))
        return figure


def _column(above: Axes, below: Axes, rows: list[dict[str, Any]], every: int) -> None:
    for row in rows:
        style = {"color": COLOURS[row["optimizer"]], "ls": LABELS[row["mode"]][1], "lw": 1.6}
        distances = row["distances_over_steps"]
        above.plot([every * i for i in range(len(distances))], distances, **style)
        below.plot(row["losses_over_steps"], distances, **style)
    logarithmic(above, "y", (1,))
    logarithmic(below, "y", (1,))
    logarithmic(below, "x", (1,))
    below.invert_xaxis()
    above.set_xlabel("step")
    below.set_xlabel("excess loss")
    below.tick_params(axis="x", labelsize=7.5)


def _legend(optimizers: list[str]) -> list[Line2D]:
    colours = {name: COLOURS[name] for name in optimizers}
    handles = [Line2D([], [], color=colour, lw=1.6, label=name) for name, colour in colours.items()]
    return handles + [
        Line2D([], [], color=INK, lw=1.6, ls=dashes, label=label)
        for label, dashes in LABELS.values()
    ]
