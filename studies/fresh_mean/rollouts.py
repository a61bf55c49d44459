"""Compare the rollouts of `fresh_mean` with those of the rollout study's other modes.

    python -m studies.fresh_mean.rollouts [--out FILE]

The runs with `fresh_mean` are in studies/results/fresh_mean_rollouts, one folder per task and
length, beside which the committed records of the rollout study are read. To repeat the runs of a
folder, copy the study's folder of the same name and continue it there:

    python -m studies.sweep.compare --task pdfa --steps 500 --episodes 512 --seeds 8 --out COPY \\
        --optimizers adamw,muon,fast-dopr-adamw+fresh_mean=true,fast-dopr-muon+fresh_mean=true

Ratios below 1 are in favour of the mode in the row.
"""

import argparse
import sys
from pathlib import Path
from statistics import fmean

import numpy as np

from data.files import write_atomic
from eval.command import command_parser
from eval.tables import markdown
from studies.optimizer_table import ROOT
from studies.rollout.results import RESULTS
from studies.stats.analysis import Compared, leaderboard, versus
from studies.stats.errors import error_of, log_error
from studies.stats.records import Record, is_finished, is_reported, load_records

FRESH = ROOT / "studies" / "results" / "fresh_mean_rollouts"
MODES = {  # in the order of the table
    "base": "{}",
    "exact": "dopr-{}",
    "fast": "fast-dopr-{}",
    "fresh mean": "fast-dopr-{}+fresh_mean=true",
}
HEADER = ("", "", "", "lr", "error", "/ base", "/ base at this lr", "/ fast", "/ exact")


def ratio(compared: Compared | None) -> str:
    """Format a ratio of rollout errors with its 95 % interval."""
    if compared is None or compared.n_pairs < 3:
        return ""
    found = compared.difference
    mean, lo, hi = np.exp([found.mean, found.lo, found.hi])
    return f"{mean:.2f} [{lo:.2f}, {hi:.2f}]"


def rows_of(stage: str, optimizer: str, records: list[Record]) -> list[tuple[str, ...]]:
    """Return a row for each mode of an optimizer that has run."""
    board = {row.variant: row for row in leaderboard(records)}
    runs = {
        mode: [r for r in records if r["variant"] == form.format(optimizer) and is_reported(r)]
        for mode, form in MODES.items()
    }
    rows = []
    for mode, form in MODES.items():
        if not runs[mode]:
            continue
        row = board[form.format(optimizer)]
        error = fmean(error_of(run).of(run) for run in runs[mode] if is_finished(run))
        others = [
            versus(runs[mode], runs[other], log_error) if mode != other else None
            for other in ("fast", "exact")
        ]
        compared = [row.versus_base, row.at_this_rate, *others]
        cells = map(ratio, compared if mode != "base" else [])
        rows.append((stage, optimizer, mode, f"{row.lr:g}", f"{error:.3g}", *cells))
    return [row + ("",) * (len(HEADER) - len(row)) for row in rows]


def table() -> str:
    """Return the table of all stages and optimizers that ran with `fresh_mean`."""
    rows = []
    for folder in sorted(FRESH.iterdir(), key=lambda path: (len(path.name), path.name)):
        records = load_records([RESULTS / folder.name, folder])
        for optimizer in ("adamw", "muon"):
            own = [record for record in records if record["base"] == optimizer]
            if any("fresh_mean" in record["variant"] for record in own):
                rows += rows_of(folder.name, optimizer, own)
    return markdown(HEADER, rows)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = command_parser("studies.fresh_mean.rollouts", __doc__)
    parser.add_argument("--out", type=Path, help="write the table to this file")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    if arguments.out:
        write_atomic(arguments.out, table() + "\n")
    print(table())


if __name__ == "__main__":
    main(sys.argv[1:])
