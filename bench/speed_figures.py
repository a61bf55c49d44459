"""Plot what was measured on a CPU: the cost of a step, generation, and the training loop.

    python -m bench.speed_figures [--results bench/results] [--out docs]

Reads the JSON of bench.peers, bench.generation and bench.train_throughput, and writes
step_cost.svg, generation.svg and throughput.svg.
"""

import json
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.command import command_parser, reported_errors
from studies.report.style import COLOURS, DASHES, GREY, HEIGHT, INK, MARKERS, STYLE, WIDTH

OURS, OTHER = COLOURS["adamw"], COLOURS["muon"]
NOT_PLOTTED = ("AdamW", "forward and backward")


def step_cost(rows: list[dict[str, Any]]) -> Figure:
    """Plot the step time of every preconditioner, divided by AdamW's, by width."""
    figure, ax = panel(1.6 * HEIGHT)
    names = [name for name in rows[0]["ratio"] if name not in NOT_PLOTTED]
    ours = [name for name in names if name.startswith("DoPr")]
    others = [name for name in names if name not in ours]
    widths = [row["width"] for row in rows]
    for group, colour in ((ours, OURS), (others, OTHER)):
        for name, dashes, marker in zip(group, DASHES, MARKERS, strict=False):
            values = [row["ratio"][name] for row in rows]
            ax.plot(widths, values, marker, ls=dashes, color=colour, ms=4, label=name)
    ax.axhline(1, color=INK, lw=0.7)
    ax.set_xscale("log", base=2)
    ax.set_xticks(widths, [str(width) for width in widths])
    ax.set_xlabel("width")
    ax.set_title("Time of a step, AdamW = 1")
    figure.legend(loc="outside right upper")
    return figure


def generation(rows: list[dict[str, Any]]) -> Figure:
    """Plot our tokens per second, divided by Hugging Face's."""
    figure, ax = panel(0.5 + 0.2 * len(rows))
    labels = [" ".join(str(row[key]) for key in generation_keys(row)) for row in rows]
    bars(ax, labels, [row["ratio"] for row in rows], OURS)
    ax.set_title("Generated tokens per second, Hugging Face = 1")
    return figure


def generation_keys(row: dict[str, Any]) -> list[str]:
    return [key for key in ("size", "dtype", "batch", "mode") if key in row]


def throughput(rows: list[dict[str, Any]]) -> Figure:
    """Plot our training loop's tokens per second, divided by nanoGPT's, round by round."""
    figure, ax = panel(0.7 * HEIGHT)
    (row,) = rows
    times = row["step_ms"]
    ratios = [b / a for a, b in zip(times["ours"], times["nanogpt"], strict=True)]
    bars(ax, [f"round {i}" for i in range(1, len(ratios) + 1)], ratios, OURS)
    ax.set_title("Trained tokens per second, nanoGPT = 1")
    return figure


FIGURES = {
    "step_cost.svg": ("peers_cpu.json", step_cost),
    "generation.svg": ("generation_cpu.json", generation),
    "throughput.svg": ("train_throughput_cpu.json", throughput),
}


def panel(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def bars(ax: Axes, labels: list[str], values: list[float], colour: str) -> None:
    """Draw horizontal bars from 1, with their values."""
    ax.barh(labels, [value - 1 for value in values], left=1, color=colour)
    for i, value in enumerate(values):
        ax.annotate(
            f"{value:.2f}", (value, i), xytext=(3, 0), textcoords="offset points", va="center"
        )
    ax.axvline(1, color=GREY)
    ax.invert_yaxis()
    ax.margins(x=0.1)


def main() -> None:
    parser = command_parser("bench.speed_figures", __doc__)
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    with reported_errors(parser), rc_context(STYLE):
        for name, (source, draw) in FIGURES.items():
            rows = json.loads((arguments.results / source).read_text())["rows"]
            path = arguments.out / name
            draw(rows).savefig(path, metadata={"Date": None})
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
