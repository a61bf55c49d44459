"""Compare each ablation of the rollout study with exact DoPr without the change."""

from pathlib import Path

import numpy as np

from studies.report.format import NONE, factor, pair, times
from studies.rollout.all_stages import ABLATIONS
from studies.rollout.results import RESULTS, grid, plain, with_records
from studies.stats.analysis import LeaderboardRow, leaderboard
from studies.stats.errors import log_error
from studies.stats.records import Record, is_finished, load_records

COLUMNS = ("validation loss, nats", "learning rates", "at equal rates, tuning seeds")


def changes_table(results: Path = RESULTS) -> str:
    """Return rollout errors and losses relative to exact DoPr; "" if no stage has run.

    The last column uses the tuning runs at rates that both sweeps have: mean ratio, runs won.
    """
    stages = with_records(ABLATIONS, results)
    found = {stage: load_records([results / stage.name]) for stage in stages}
    header = [""]
    for stage, records in found.items():
        header += [f"{stage.task}: {records[0]['primary']}", *COLUMNS]
    return grid(header, [*map(_changed, found.values())], n_columns=4) if found else ""


def _changed(records: list[Record]) -> dict[str, tuple[str, ...]]:
    """Return the cells of each change."""
    with_dopr = [record for record in records if record["variant"].startswith("dopr-")]
    against = [record | {"base": f"dopr-{record['base']}"} for record in with_dopr]
    rows = leaderboard(against)
    rates = {row.variant: row.lr for row in rows}
    return {
        row.variant: (*_as_tuned(row, rates[row.base]), at_equal_rates(row, against))
        for row in rows
        if row.variant != row.base
    }


def _as_tuned(row: LeaderboardRow, base_rate: float) -> tuple[str, ...]:
    error, loss = row.versus_base, row.val_versus_base
    return (
        plain(times(error.difference)) if error else NONE,
        plain(pair(loss.difference, sign=True)) if loss else NONE,
        f"{row.lr:g} / {base_rate:g}",
    )


def at_equal_rates(row: LeaderboardRow, records: list[Record]) -> str:
    """Return the mean ratio to the base over tuning runs at equal rates and seeds, and wins."""
    runs = {
        (record["variant"], record["lr"], record["seed"]): log_error(record)
        for record in records
        if record["role"] == "tuning" and is_finished(record)
    }
    differences = [
        value - runs[row.base, lr, seed]
        for (variant, lr, seed), value in runs.items()
        if variant == row.variant and (row.base, lr, seed) in runs
    ]
    if not differences:
        return NONE
    won = sum(each < 0 for each in differences)
    return f"{factor(float(np.mean(differences)))} ({won}/{len(differences)})"
