"""Draw the error of samples over the excess loss, from the results of study.py.

    python -m studies.flow.figure [--out docs/flow_matching.png]

One panel per target. A line joins the runs of an optimizer and mode with several numbers of steps,
at the tuned rate: geometric means over the seeds. Where a mode lies above its base, its samples are
worse at equal excess loss.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from eval.command import command_parser
from studies.flow.comparison import Metrics
from studies.flow.runs import MODES, FlowResults
from studies.flow.study import PROTOCOL, Comparison, finished_comparisons
from studies.optimizer_table import ROOT
from studies.report.style import COLOURS, DASHES, INK, STYLE, legend_on_top, logarithmic, save_png

RESULTS = ROOT / "studies" / "results" / "flow.json"
MARKERS = dict(zip(MODES, "o^s", strict=True))
LINES = dict(zip(MODES, [DASHES[1], DASHES[0], DASHES[2]], strict=True))


def draw(comparisons: Sequence[Comparison]) -> Figure:
    """Draw one panel for every target of the comparisons."""
    targets = list(dict.fromkeys(each.target for each in comparisons))
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.2), layout="constrained")
        panels = figure.subplots(1, len(targets), squeeze=False)[0]
        axes = dict(zip(targets, panels, strict=True))
        for each in comparisons:
            for mode in MODES:
                xs, ys = curve_of(each.lengths(mode))
                style = {"marker": MARKERS[mode], "ls": LINES[mode], "ms": 4, "lw": 1.3}
                axes[each.target].plot(xs, ys, color=COLOURS[each.optimizer], **style)
        for target, ax in axes.items():
            ax.set(title=target, xlabel="excess loss")
            logarithmic(ax, "x", (1, 2, 5))
            logarithmic(ax, "y", (1, 2, 5))
        panels[0].set_ylabel("paired error of samples")
        legend_on_top(figure, _keys())
        return figure


def curve_of(lengths: Sequence[Sequence[Metrics]]) -> tuple[np.ndarray, np.ndarray]:
    """Return geometric means over seeds of excess and paired error, one for each length.

    lengths: for each seed, the metrics of runs with several numbers of steps.
    """
    points = [
        [(run["excess"], run["paired"]) for run in runs if run]
        for runs in zip(*lengths, strict=True)
    ]
    means = np.array([np.exp(np.log(each).mean(0)) for each in points if each])
    return means[:, 0], means[:, 1]


def _keys() -> list[Line2D]:
    """Return the entries of the legend: colours for optimizers, markers for modes."""
    optimizers = ("adamw", "muon")
    keys = [Line2D([], [], color=COLOURS[name], lw=2, label=name) for name in optimizers]
    for mode in MODES:
        style = {"marker": MARKERS[mode], "ls": LINES[mode], "ms": 4}
        label = "no DoPr" if mode == "base" else f"{mode} DoPr"
        keys.append(Line2D([], [], color=INK, label=label, **style))
    return keys


def main(argv: list[str]) -> None:
    parser = command_parser("studies.flow.figure", __doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/flow_matching.png"))
    arguments = parser.parse_args(argv)
    save_png(draw(finished_comparisons(FlowResults(RESULTS, PROTOCOL))), arguments.out)


if __name__ == "__main__":
    main(sys.argv[1:])
