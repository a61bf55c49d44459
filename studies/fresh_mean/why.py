"""Find out why the mean of a layer's inputs must be fresh: train with one part of DoPr at a time.

    python -m studies.fresh_mean.why --out studies/results/fresh_mean_why.json

docs/log/2026-11-29-why-fresh-mean.md contains the protocol. The model, the data and AdamW are
those of studies/optimizer_table.py. Each rule of interventions.py is tuned on one seed and runs on
three others at its best rate. The angles use the best rate of exact mode. Finished runs are not
repeated.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from data.files import write_atomic
from eval.command import command_parser
from eval.tables import markdown
from studies.fresh_mean.interventions import GAMMA, RULES, Intervention
from studies.optimizer_table import KEY, MODEL, ROOT, RUN, command_of, final_loss, settings_of
from studies.pool import map_in_pool
from studies.sweep.study import best_rate, further_rate
from studies.sweep.trial import train_in

RUNS = ROOT / "out" / f"fresh_mean_why-{KEY}"
TUNING_SEED, FRESH_SEEDS = 20, (21, 22)
ROTATED = tuple(rule for rule in RULES if rule.startswith("rotated"))
TUNED = tuple(rule for rule in RULES if rule not in ROTATED)
RATES = (8e-3, 1.6e-2, 3.2e-2)  # the first grid; it grows while the best rate is at its edge


def run(rule: str, lr: float, seed: int) -> dict[str, Any]:
    """Return the loss and the measurements of one training run; an infinite loss if it diverged."""
    out = RUNS / f"{rule.replace(' ', '-')}_lr={lr:g}_seed={seed}"
    result = out / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    with Intervention(RULES[rule]) as intervention:
        has_finished = train_in(out, command_of(settings_of("adamw", lr, seed, {}), out))
    loss = final_loss(out) if has_finished else math.inf
    found = {"loss": loss, "measured": intervention.measured}
    write_atomic(result, json.dumps(found))
    return found


def measure_rule(rule: str) -> dict[str, Any]:
    """Return the row of one rule: its losses by rate on the tuning seed, and the fresh seeds."""
    losses = {lr: run(rule, lr, TUNING_SEED)["loss"] for lr in RATES}
    while lr := further_rate(losses):
        losses[lr] = run(rule, lr, TUNING_SEED)["loss"]
    return row_of(rule, best_rate(losses)) | {"sweep": dict(sorted(losses.items()))}


def row_of(rule: str, lr: float) -> dict[str, Any]:
    """Return the losses of a rule on the fresh seeds, and the mean measurements of the first."""
    found = [run(rule, lr, seed) for seed in FRESH_SEEDS]
    return {
        "rule": rule,
        "lr": lr,
        "losses": [each["loss"] for each in found],
        "measured": found[0]["measured"],
    }


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return a table with one row per rule."""
    cells = [
        (row["rule"], f"{row['lr']:g}", *(f"{loss:.3f}" for loss in row["losses"])) for row in rows
    ]
    return markdown(("rule", "lr", *(f"seed {seed}" for seed in FRESH_SEEDS)), cells)


def main() -> None:
    parser = command_parser("studies.fresh_mean.why", __doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    arguments = parser.parse_args()
    rows = map_in_pool(measure_rule, TUNED, arguments.workers, "rules")
    exact = next(row for row in rows if row["rule"] == "exact")
    at_rate = partial(row_of, lr=exact["lr"])
    rows += map_in_pool(at_rate, ROTATED, arguments.workers, "angles")
    result = {"model": MODEL, "run": RUN, "gamma": GAMMA, "rows": rows}
    result |= {"tuning_seed": TUNING_SEED, "fresh_seeds": FRESH_SEEDS}
    write_atomic(arguments.out, json.dumps(result) + "\n")
    print(table_of(rows))


if __name__ == "__main__":
    main()
