"""Change one setting of the mode "fresh mean" at a time, at the rate of comparison.py.

    python -m studies.fresh_mean.ablations --out studies/results/fresh_mean_ablations.json

The seeds are those of no other study. The rates are those that comparison.py found for the
unchanged mode, so a change that would need another rate looks worse than it is.
"""

import json
from typing import Any

from data.files import write_atomic
from eval.command import reported_errors
from eval.tables import markdown
from studies.fresh_mean.comparison import MODES, tuned_rates
from studies.optimizer_table import run, summary
from studies.pool import map_in_pool, pool_parser

SEEDS = (30, 31)
NO_MEAN = {"fresh_mean": False}
CHANGES: dict[str, dict[str, Any]] = {
    "unchanged": {},
    "refresh_every=3": {"refresh_every": 3},
    "refresh_every=3, sigma_beta=none": {"refresh_every": 3, "sigma_beta": "none"},
    "sigma_beta=none": {"sigma_beta": "none"},
    "refresh_every=30": {"refresh_every": 30},
    "gamma=0.01": {"gamma": 0.01},
    "gamma=1": {"gamma": 1.0},
    "collect_every=10, token_stride=4": {"collect_every": 10, "token_stride": 4},
    "block_diagonal=64": {"block_diagonal": 64},
    "refresh_every=3, without fresh_mean": {"refresh_every": 3, "sigma_beta": "none"} | NO_MEAN,
}


def measure(task: tuple[str, float, str]) -> dict[str, Any]:
    """Return the row of one optimizer and change."""
    optimizer, lr, change = task
    settings = MODES["fresh mean"] | CHANGES[change]
    losses = [run(optimizer, lr, seed, **settings) for seed in SEEDS]
    return {"optimizer": optimizer, "change": change, "lr": lr, **summary(losses)}


def table_of(rows: list[dict[str, Any]]) -> str:
    cells = [
        (row["optimizer"], row["change"], f"{row['lr']:g}", f"{row['mean']:.3f} ± {row['sd']:.3f}")
        for row in rows
    ]
    return markdown(("", "change", "lr", "val loss, mean ± sd of 2 seeds"), cells)


def main() -> None:
    parser = pool_parser("studies.fresh_mean.ablations", __doc__)
    parser.add_argument("--optimizers", default="adamw,muon", help="comma-separated")
    arguments = parser.parse_args()
    with reported_errors(parser):
        rates = tuned_rates(arguments.optimizers)
        tasks = [(name, rates[name], change) for change in CHANGES for name in rates]
        rows = map_in_pool(measure, tasks, arguments.workers)
        write_atomic(arguments.out, json.dumps({"seeds": SEEDS, "rows": rows}, indent=2) + "\n")
        print(table_of(rows))


if __name__ == "__main__":
    main()
