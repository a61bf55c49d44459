"""Draw clones at equal validation loss: two of them walking, their survival, and all returns.

    MUJOCO_GL=egl python -m studies.humanoid.figure RESULTS.json [--out docs/humanoid.png]

RESULTS.json is the output of studies.humanoid.matched. DoPr has 2,000 steps, and its base the
fewest with which its validation loss is not higher. Above, one clone of each: the median episode
of the seed with the median return, photographed around the time at which the base's clone falls.
Below, the share of the episodes that go on, as a mean over seeds, and the return of every run.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.command import command_parser, reported_errors
from studies.humanoid.episodes import LIMIT_STEPS, first_states, rollout
from studies.humanoid.grading import GRADING_SEED
from studies.humanoid.matched import Row, key_of
from studies.humanoid.strobe import HIGH, LOW, film, strobe
from studies.humanoid.task import Humanoid
from studies.humanoid.trial import HumanoidTrial, clone_of
from studies.report.style import COLOURS, GREY, STYLE, logarithmic, save_png
from studies.rows import load_rows
from studies.sweep.study import FRESH
from studies.sweep.variants import FAST_PREFIX

STEPS = 2000  # of the clone with DoPr
N = Humanoid.default_episodes
BEFORE, AFTER, EVERY = 310, 90, 31  # steps before and after the fall, and between photographs
LENGTH = 9.6  # metres of a strip
NAMES = {"adamw": "AdamW", "muon": "Muon"}


def chosen_pair(rows: list[Row]) -> tuple[Row, Row]:
    """Return the rows of the base and of DoPr that are shown.

    Raises ValueError if there is none, or the base's validation loss is never as low.
    """
    dopr = [row for row in rows if row["variant"].startswith(FAST_PREFIX)]
    with_dopr = next((row for row in dopr if row["steps"] == STEPS), None)
    if with_dopr is None:
        raise ValueError(f"the file has no run of this expert with DoPr and {STEPS} steps")
    base = with_dopr["variant"].removeprefix(FAST_PREFIX)
    bases = [row for row in rows if row["variant"] == base]
    loss = np.mean(with_dopr["val_loss"])
    for row in sorted(bases, key=lambda row: row["steps"]):
        if np.mean(row["val_loss"]) <= loss:
            return row, with_dopr
    raise ValueError(f"no run without DoPr has a validation loss of {loss:.5f} or lower")


def median_index(values: Any) -> int:
    """Return the index of the median, or of the lower median if there are two."""
    return int(np.argsort(values, kind="stable")[(len(values) - 1) // 2])


def median_film(row: Row) -> tuple[np.ndarray, int]:
    """Return the positions in the median episode of the median seed, and the step of its end."""
    task, seed = Humanoid(expert=row["expert"]), median_index(row["return"])
    settings = dict(HumanoidTrial.parse_variant(row["variant"]).settings)
    clone = clone_of(task, settings | {"max_steps": row["steps"]}, row["lr"], FRESH + seed)
    assert clone, "the run of the results did not diverge"
    episodes = rollout(clone, N, GRADING_SEED)
    episode = median_index(episodes.returns)
    start, actions = first_states(N, GRADING_SEED)[episode], episodes.actions[episode]
    positions = film(start, actions, clone, LIMIT_STEPS + AFTER)
    return positions, int(episodes.lengths[episode])


def label(row: Row) -> str:
    base = row["variant"].removeprefix(FAST_PREFIX)
    prefix = "DoPr-" if base != row["variant"] else ""
    return f"{prefix}{NAMES.get(base, base)}, {row['steps']:,} steps"


def colour(row: Row) -> str:
    return COLOURS["muon"] if row["variant"].startswith(FAST_PREFIX) else COLOURS["adamw"]


def draw(rows: list[Row], films: list[tuple[np.ndarray, int]]) -> Figure:
    """Draw the figure of one expert and one base. films: of the base, then of DoPr."""
    pair = chosen_pair(rows)
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 7.0), layout="constrained")
        strips = figure.subplot_mosaic("AA;BB;CD", height_ratios=(1, 1, 1.25))
        start = max(0, min(films[0][1], LIMIT_STEPS) - BEFORE)
        for ax, row, (positions, _) in zip((strips["A"], strips["B"]), pair, films, strict=True):
            _strip(ax, positions[start : start + BEFORE + AFTER], row)
        strips["B"].set_xlabel("metres")
        _survival(strips["C"], pair)
        _returns(strips["D"], rows)
        return figure


def _strip(ax: Axes, positions: np.ndarray, row: Row) -> None:
    """Show photographs of a clone above the floor."""
    picture = strobe(positions, EVERY, LENGTH)
    ax.imshow(picture, extent=(-0.5, LENGTH, LOW, HIGH), interpolation="antialiased")
    ax.axhline(0, color=GREY, lw=0.8, zorder=0)
    ax.set(xlim=(-0.5, LENGTH), ylim=(LOW, HIGH), yticks=[])
    ax.grid(visible=False)
    ax.spines[["left", "bottom"]].set_visible(False)
    means = np.mean(row["val_loss"]), np.mean(row["return"]), np.mean(row["falls"])
    ax.set_title(
        "{}: validation loss {:.5f}, return {:,.0f}, {:.0%} fall".format(label(row), *means),
        color=colour(row),
    )


def _survival(ax: Axes, pair: tuple[Row, Row]) -> None:
    """Draw the share of the episodes that go on, over the steps of an episode."""
    for row in pair:
        share = [1.0, *row["survival"]]
        ax.plot(np.linspace(0, LIMIT_STEPS, len(share)), share, color=colour(row), label=label(row))
    ax.set(xlabel="step of the episode", ylim=(0, 1.05), title="Share that has not fallen")
    ax.legend(loc="lower left")


def _returns(ax: Axes, rows: list[Row]) -> None:
    """Draw the return of every run over its validation loss, and the means of equal runs."""
    for is_dopr in (False, True):
        own = [row for row in rows if row["variant"].startswith(FAST_PREFIX) == is_dopr]
        for row in own:
            ax.plot(row["val_loss"], row["return"], "o", ms=3, alpha=0.5, color=colour(row))
        means = [(np.exp(np.log(r["val_loss"]).mean()), np.mean(r["return"])) for r in own]
        ax.plot(*zip(*means, strict=True), color=colour(own[0]))
        for row, (x, y) in zip(own, means, strict=True):
            ax.annotate(
                f"{row['steps']:,} steps", (x, y), (5, 5), textcoords="offset points", fontsize=7
            )
    logarithmic(ax, "x", (1, 2, 3, 5))
    ax.xaxis.set_major_formatter("{x:.4f}")
    ax.set(xlabel="validation loss", title="Return of every run")


def parse(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = command_parser("studies.humanoid.figure", __doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--expert", default="walk-1")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--out", type=Path, default=Path("docs/humanoid.png"))
    return parser, parser.parse_args(argv)


def main(argv: list[str]) -> None:
    parser, arguments = parse(argv)
    with reported_errors(parser):
        names = (arguments.optimizer, FAST_PREFIX + arguments.optimizer)
        rows = load_rows(arguments.results, key_of).values()
        rows = [r for r in rows if r["expert"] == arguments.expert and r["variant"] in names]
        rows = [row for row in rows if key_of(row).rate_factor == 1]
        figure = draw(rows, [median_film(row) for row in chosen_pair(rows)])
        save_png(figure, arguments.out)


if __name__ == "__main__":
    main(sys.argv[1:])
