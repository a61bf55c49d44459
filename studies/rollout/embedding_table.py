"""Print whether DoPr still helps AdamW's rollouts if the embedding has a rate of its own.

    python -m studies.rollout.embedding_table studies/results/embedding_rate

For each task and mode: once with one rate for all parameters, and once with the rate of the
embedding (that of the other parameters, or one of EMBEDDING_RATES) whose validation loss on the
tuning seeds is the lowest. Errors are means over the fresh seeds. Ratios of errors are paired over
seeds, with 95 % intervals: to the base in the same case, and to the base at the same two rates.
"""

import sys
from pathlib import Path
from statistics import fmean

from eval.command import command_parser, reported_errors
from eval.tables import markdown
from studies.rollout.embedding import BASE, EXACT, FAST, STAGES
from studies.rollout.results import ratio
from studies.stats.analysis import LeaderboardRow, leaderboard, versus
from studies.stats.errors import error_of, log_error
from studies.stats.records import (
    RECORDS,
    AnalysisError,
    Record,
    is_finished,
    is_reported,
    read_records,
)
from studies.sweep.study import mean_loss

HEADER = ("", "mode", "embedding", "others", "val loss", "error", "/ base", "/ base at these rates")
NAMES = {BASE: "base", FAST: "fast", EXACT: "exact"}
ONE_RATE = "as others"


def table(folder: Path) -> str:
    """Return the rows of all tasks that have run.

    Raises AnalysisError if there are none.
    """
    rows = []
    for stage in STAGES:
        if records := read_records(folder / stage.name / RECORDS):
            rows += task_rows(stage.name, records)
    if not rows:
        raise AnalysisError(f"{folder} has no records of studies.rollout.embedding")
    return markdown(HEADER, rows)


def task_rows(task: str, records: list[Record]) -> list[tuple[str, ...]]:
    """Return a row for each mode with one rate, then one for each with the embedding's."""
    board = {row.variant: row for row in leaderboard(records)}
    modes = [mode for mode in NAMES if mode in board]
    cases = [{mode: mode for mode in modes}, {mode: tuned(mode, board, records) for mode in modes}]
    return [
        (f"`{task}`", NAMES[mode], *_cells(board[case[mode]], case[BASE], records))
        for case in cases
        for mode in modes
    ]


def tuned(mode: str, board: dict[str, LeaderboardRow], records: list[Record]) -> str:
    """Return the variant of a mode with the lowest loss on the tuning seeds, at its own rate."""

    def loss(variant: str) -> float:
        lr = board[variant].lr
        return mean_loss(
            record
            for record in records
            if (record["variant"], record["lr"], record["role"]) == (variant, lr, "tuning")
        )

    return min((name for name in board if name.split("+")[0] == mode), key=loss)


def _cells(row: LeaderboardRow, base: str, records: list[Record]) -> tuple[str, ...]:
    rate = row.variant.partition("embedding_lr=")[2] or ONE_RATE
    runs = [record for record in records if is_reported(record)]
    own, others = ([run for run in runs if run["variant"] == name] for name in (row.variant, base))
    finished = [run for run in own if is_finished(run)]
    error = fmean(error_of(run).of(run) for run in finished) if finished else float("nan")
    ratios = (versus(own, others, log_error), row.at_this_rate)
    cells = map(ratio, ratios) if row.base != row.variant else ("", "")
    return rate, f"{row.lr:g}", f"{row.val_loss.mean:.3f}", f"{error:.3g}", *cells


def main(argv: list[str]) -> None:
    parser = command_parser("studies.rollout.embedding_table", __doc__)
    parser.add_argument("folder", type=Path, help="--out of studies.rollout.embedding")
    arguments = parser.parse_args(argv)
    with reported_errors(parser):
        print(table(arguments.folder))


if __name__ == "__main__":
    main(sys.argv[1:])
