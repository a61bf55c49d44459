"""Draw the README's figure: rollout errors of AdamW and of fast DoPr-AdamW, seed by seed.

    python -m studies.rollout.headline_figure [--out docs/rollouts.png]

Each line is one seed of the rollout study, trained twice: left without DoPr, right with it, each
optimizer at its own tuned learning rate. Thick lines are geometric means. The title gives the ratio
of the rollout errors with its 95 % interval over seeds, as in studies/results/rollout/tables.md.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.command import command_parser
from studies.report.style import GREY, INK, STYLE, save_png
from studies.rollout.results import RESULTS
from studies.stats.errors import error_of
from studies.stats.records import AnalysisError, Record, load_records
from studies.stats.seeds import over_seeds

BASE, VARIANT = "adamw", "fast-dopr-adamw"
TASKS = {  # task: label of its rollout error
    "pdfa": "random language:\ndivergence, nats",
    "ctrl": "pendulum:\nshare that falls",
    "nav": "graph:\nshare of goals missed",
}
STEPS = (500, 1500)


def errors(records: list[Record], variant: str) -> dict[int, float]:
    """Return {seed: rollout error} of a variant's fresh runs; lower is better."""
    found = [each for each in records if each["variant"] == variant and each["role"] == "fresh"]
    return {each["seed"]: error_of(each).of(each) for each in found}


def ratio(base: np.ndarray, variant: np.ndarray) -> tuple[float, float, float]:
    """Return the geometric mean of variant / base over seeds, and its 95 % interval."""
    found = over_seeds(np.log(variant / base).tolist())
    return float(np.exp(found.mean)), float(np.exp(found.lo)), float(np.exp(found.hi))


def pairs(results: Path, task: str, steps: int) -> np.ndarray:  # (2, seeds)
    """Return the rollout errors of the base and of the variant on the same seeds."""
    records = load_records([results / f"{task}-{steps}"])
    base, variant = errors(records, BASE), errors(records, VARIANT)
    return np.array([[each[seed] for seed in sorted(base)] for each in (base, variant)])


def draw(results: Path = RESULTS) -> Figure:
    """Draw one panel for each task and training length."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 2.9), layout="constrained")
        panels = [(task, steps) for task in TASKS for steps in STEPS]
        for ax, (task, steps) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            _panel(ax, pairs(results, task, steps), steps)
            if steps == STEPS[0]:
                ax.set_ylabel(TASKS[task], fontsize=8)
        return figure


def _panel(ax: Axes, errors: np.ndarray, steps: int) -> None:
    """Draw a line for each seed from the base to the variant, and their mean."""
    mean, lo, hi = ratio(*errors)
    ax.plot([0, 1], errors, color=GREY, lw=0.8, marker="o", ms=2)
    ax.plot([0, 1], np.exp(np.log(errors).mean(axis=1)), color=INK, lw=2.5, marker="o", ms=5)
    ax.set_title(f"{steps:,} steps\n× {mean:.2f}\n[{lo:.2f}, {hi:.2f}]", fontsize=8)
    ax.set_xticks([0, 1], ["without", "with"])
    ax.tick_params(labelsize=7.5)
    ax.set_xlim(-0.3, 1.3)
    ax.set_ylim(0)


def main(argv: list[str]) -> None:
    parser = command_parser("studies.rollout.headline_figure", __doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/rollouts.png"))
    arguments = parser.parse_args(argv)
    try:
        figure = draw()
    except AnalysisError as error:
        parser.exit(2, f"error: {error}\n")
    save_png(figure, arguments.out)


if __name__ == "__main__":
    main(sys.argv[1:])
