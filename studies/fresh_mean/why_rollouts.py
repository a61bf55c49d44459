"""Train with one part of DoPr at a time on `pdfa`, and grade the rollouts.

    python -m studies.fresh_mean.why_rollouts --out studies/results/fresh_mean_why_pdfa.json

On text a fresh mean is better than an averaged one, on `pdfa` it is the other way round. The rules
are those of interventions.py, and the task, the model and the tuning those of the rollout study:
the rate is chosen by the validation loss on seeds 0 and 1, and seeds 300 to 307 are reported.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from data.files import write_atomic
from eval.command import reported_errors
from eval.rollout.tasks import parse_task
from eval.tables import markdown
from studies.fresh_mean.interventions import RULES, Intervention, folder_of, kept
from studies.optimizer_table import ROOT
from studies.pool import map_in_pool, pool_parser
from studies.stats.errors import log_error, primary
from studies.stats.records import val_loss
from studies.stats.seeds import over_seeds
from studies.sweep.study import best_rate, search_rates
from studies.sweep.trial import GRIDS, TrainTrial

TASK = "pdfa"
TUNING_SEEDS, FRESH_SEEDS = (0, 1), range(300, 308)
STEPS, TOKENS, EPISODES = 500, 1024, 512
RUNS = ROOT / "out" / f"fresh_mean_why_{TASK}-{STEPS}-{TOKENS}-{EPISODES}"
TESTED = ("base", "exact", "stale mean", "averaged C", "averaged mean", "no mean", "mean removed")


def run(rule: str, lr: float, seed: int) -> dict[str, Any]:
    """Return the validation loss of a run, its rollout error, and the logarithm of the error."""
    task = replace(parse_task(TASK), instance=seed)
    sizes = TrainTrial.sizes(task, STEPS, TOKENS)
    settings = {"optimizer": "adamw", "max_steps": STEPS} | sizes

    def make(folder: Path) -> dict[str, Any]:
        trial = TrainTrial(folder, task, rule, "adamw", "fresh", lr, seed, settings, EPISODES)
        with Intervention(RULES[rule]):
            record = trial.make()
        return {"loss": val_loss(record), "error": primary(record), "log_error": log_error(record)}

    return kept(folder_of(RUNS, rule, lr, seed), make)


def measure(rule: str) -> dict[str, Any]:
    """Return the row of one rule: its sweep and its fresh runs."""

    def tuning_loss(lr: float) -> float:
        loss = fmean(run(rule, lr, seed)["loss"] for seed in TUNING_SEEDS)
        return math.inf if math.isnan(loss) else loss

    losses = search_rates(tuning_loss, GRIDS["adamw"], rule)
    lr = best_rate(losses)
    return {
        "rule": rule,
        "lr": lr,
        "sweep": losses,
        "runs": [run(rule, lr, s) for s in FRESH_SEEDS],
    }


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return a table with the ratio of each rule's rollout error to the base's, by seed."""
    base = next(row["runs"] for row in rows if row["rule"] == "base")
    cells = []
    for row in rows:
        pairs = zip(row["runs"], base, strict=True)
        found = over_seeds([own["log_error"] - other["log_error"] for own, other in pairs])
        mean, lo, hi = map(math.exp, (found.mean, found.lo, found.hi))
        ratio = f"{mean:.2f} [{lo:.2f}, {hi:.2f}]" if row["rule"] != "base" else ""
        means = [fmean(run[key] for run in row["runs"]) for key in ("loss", "error")]
        cells.append((row["rule"], f"{row['lr']:g}", f"{means[0]:.4f}", f"{means[1]:.1f}", ratio))
    return markdown(("rule", "lr", "val loss", "rollout error", "/ base"), cells)


def main() -> None:
    parser = pool_parser("studies.fresh_mean.why_rollouts", __doc__)
    arguments = parser.parse_args()
    with reported_errors(parser):
        rows = map_in_pool(measure, TESTED, arguments.workers)
        write_atomic(arguments.out, json.dumps({"seeds": [*FRESH_SEEDS], "rows": rows}) + "\n")
        print(table_of(rows))


if __name__ == "__main__":
    main()
