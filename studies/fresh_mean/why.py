"""Find out why the mean of a layer's inputs must be fresh: train with one part of DoPr at a time.

    python -m studies.fresh_mean.why --out studies/results/fresh_mean_why.json

docs/log/2026-11-29-why-fresh-mean.md contains the protocol. The model, the data and AdamW are those
of studies/optimizer_table.py. Every rule of interventions.py runs at the rate that comparison.py
found for exact mode and for fresh mean, and AdamW without DoPr also at its own. Finished runs are
not repeated.
"""

import json
import math
from pathlib import Path
from typing import Any

from data.files import write_atomic
from eval.command import reported_errors
from eval.tables import markdown
from studies.fresh_mean.interventions import GAMMA, RULES, Intervention, folder_of, kept
from studies.optimizer_table import KEY, MODEL, ROOT, RUN, command_of, final_loss, settings_of
from studies.pool import map_in_pool, pool_parser
from studies.sweep.trial import train_in

RUNS = ROOT / "out" / f"fresh_mean_why-{KEY}"
LR, BASE_LR = 1.6e-2, 4e-3
SEEDS = (21, 22)
MEASURED = ("base", "exact")  # rules whose measurements are kept


def run(rule: str, lr: float, seed: int) -> dict[str, Any]:
    """Return the loss and the measurements of one training run; an infinite loss if it diverged."""

    def make(folder: Path) -> dict[str, Any]:
        command = command_of(settings_of("adamw", lr, seed, {}), folder)
        with Intervention(RULES[rule]) as intervention:
            has_finished = train_in(folder, command)
        loss = final_loss(folder) if has_finished else math.inf
        return {"loss": loss, "measured": intervention.measured}

    return kept(folder_of(RUNS, rule, lr, seed), make)


def measure(task: tuple[str, float]) -> dict[str, Any]:
    """Return the losses of a rule at a rate, and some rules' measurements on the first seed."""
    rule, lr = task
    found = [run(rule, lr, seed) for seed in SEEDS]
    row = {"rule": rule, "lr": lr, "losses": [each["loss"] for each in found]}
    return row | ({"measured": found[0]["measured"]} if rule in MEASURED else {})


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return a table with one row per rule and rate."""
    cells = [
        (row["rule"], f"{row['lr']:g}", *(f"{loss:.3f}" for loss in row["losses"])) for row in rows
    ]
    return markdown(("rule", "lr", *(f"seed {seed}" for seed in SEEDS)), cells)


def main() -> None:
    parser = pool_parser("studies.fresh_mean.why", __doc__)
    arguments = parser.parse_args()
    with reported_errors(parser):
        tasks = [("base", BASE_LR), *((rule, LR) for rule in RULES)]
        rows = map_in_pool(measure, tasks, arguments.workers)
        result = {"model": MODEL, "run": RUN, "gamma": GAMMA, "seeds": SEEDS, "rows": rows}
        write_atomic(arguments.out, json.dumps(result) + "\n")
        print(table_of(rows))


if __name__ == "__main__":
    main()
