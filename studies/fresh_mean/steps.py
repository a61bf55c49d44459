"""Count the steps in which `fresh_mean` reaches the final validation loss of its base optimizer.

    python -m studies.fresh_mean.steps --out studies/results/fresh_mean_steps.json

For each length, a whole run with its own schedule is trained, at the rate and on the seeds of
comparison.py. Between the lengths, the loss is interpolated against the logarithm of the steps.
"""

import json
import math
from itertools import pairwise
from typing import Any

from data.files import write_atomic
from eval.command import reported_errors
from eval.tables import markdown
from studies.fresh_mean.comparison import FRESH_SEEDS, MODES, row_in, tuned_rates
from studies.optimizer_table import RUN, run
from studies.pool import map_in_pool, pool_parser
from studies.stats.seeds import over_seeds

LENGTHS = (100, 200, 300, 400)


def losses_of(task: tuple[str, float, int]) -> list[float]:
    """Return the losses of the fresh seeds after a number of steps."""
    optimizer, lr, n = task
    length = {"max_steps": n, "warmup_steps": n // 10, "eval_every": n, "save_every": n}
    changes = MODES["fresh mean"] | (length if n != RUN["max_steps"] else {})
    return [run(optimizer, lr, seed, **changes) for seed in FRESH_SEEDS]


def steps_to(target: float, losses: dict[int, float]) -> float:
    """Return the number of steps in which the loss reaches the target.

    Args:
        losses: the loss after each number of steps, in increasing order.
    Returns:
        The least number if even this run is below the target, and infinity if no run reaches it.
    """
    lengths = list(losses)
    if losses[lengths[0]] <= target:
        return lengths[0]
    for short, long in pairwise(lengths):
        if losses[long] <= target:
            part = (losses[short] - target) / (losses[short] - losses[long])
            return short * (long / short) ** part
    return math.inf


def row_of(optimizer: str, target: list[float], losses: dict[int, list[float]]) -> dict[str, Any]:
    """Return the steps of each seed, and their geometric mean ratio with its 95 % t-interval."""
    by_seed = [
        dict(zip(losses, values, strict=True)) for values in zip(*losses.values(), strict=True)
    ]
    steps = [steps_to(loss, own) for loss, own in zip(target, by_seed, strict=True)]
    row = {"optimizer": optimizer, "base": target, "losses": losses, "steps": steps}
    if math.inf in steps:
        return row | {"ratio": None, "interval": None}
    found = over_seeds([math.log(each / RUN["max_steps"]) for each in steps])
    interval = [math.exp(found.lo), math.exp(found.hi)]
    return row | {"ratio": math.exp(found.mean), "interval": interval}


def table_of(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        steps = ", ".join(f"{each:.0f}" for each in row["steps"])
        low, high = row["interval"] or (math.nan, math.nan)
        ratio = f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]" if row["ratio"] else "not reached"
        cells.append((row["optimizer"], steps, ratio))
    header = ("", f"steps to the base's loss after {RUN['max_steps']}, by seed", "ratio")
    return markdown(header, cells)


def main() -> None:
    parser = pool_parser("studies.fresh_mean.steps", __doc__)
    parser.add_argument("--optimizers", default="adamw,muon", help="comma-separated")
    arguments = parser.parse_args()
    with reported_errors(parser):
        rates = tuned_rates(arguments.optimizers)
        tasks = [(name, rates[name], n) for name in rates for n in LENGTHS]
        found = dict(zip(tasks, map_in_pool(losses_of, tasks, arguments.workers), strict=True))
        rows = []
        for name in rates:
            losses = {n: found[name, rates[name], n] for n in LENGTHS}
            rows.append(row_of(name, row_in(name, "base")["losses"], losses))
        write_atomic(arguments.out, json.dumps({"lengths": LENGTHS, "rows": rows}, indent=2) + "\n")
        print(table_of(rows))


if __name__ == "__main__":
    main()
