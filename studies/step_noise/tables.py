"""Print the agreements of the steps of clones that studies.step_noise.humanoid wrote to a file.

    python -m studies.step_noise.tables studies/results/step_noise.json

A row is a task, by the knobs that its spec names last; a cell has the mean over seeds of every
layer, from the first to the last, and the mean of these. The last column is the agreement behind
the batch's own Σ over that behind the mean Σ.
"""

import sys
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from eval.command import command_parser, reported_errors
from eval.tables import markdown
from studies.rows import Row, load_rows
from studies.step_noise.agreement import COLUMNS
from studies.step_noise.humanoid import KEY

COMMON = "whitening=0.0"  # the last knob that every spec names


def agreements_of(rows: list[Row]) -> dict[str, np.ndarray]:
    """Return {task: agreements (seeds, layers, columns)}."""
    by_task = groupby(sorted(rows, key=KEY), itemgetter("task"))
    return {
        task: np.array([list(row["agreements"].values()) for row in own]) for task, own in by_task
    }


def table(rows: list[Row]) -> str:
    cells = []
    for task, found in agreements_of(rows).items():
        knobs = task.partition(COMMON)[2].lstrip(",") or "as it is"
        layers = found.mean(0).T  # (columns, layers)
        ratios = ", ".join(
            f"{own / mean:.2f}" for own, mean in zip(layers[3], layers[1], strict=True)
        )
        cells.append((knobs, f"{len(found)}", *map(_cell, layers), ratios))
    return markdown(("task", "seeds", *COLUMNS, "own / mean"), cells)


def _cell(layers: np.ndarray) -> str:
    return f"{', '.join(f'{each:.2f}' for each in layers)}: {layers.mean():.3f}"


def main(argv: list[str]) -> None:
    parser = command_parser("studies.step_noise.tables", __doc__)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args(argv)
    with reported_errors(parser):
        rows = load_rows(arguments.file, KEY)
        if not rows:
            raise ValueError(f"{arguments.file}: there is no such file, or it is empty")
        print(table([*rows.values()]))


if __name__ == "__main__":
    main(sys.argv[1:])
