"""Compare `fresh_mean` with exact mode, fast mode and no DoPr on validation loss.

    python -m studies.fresh_mean --out studies/results/fresh_mean.json [--optimizers adamw,muon]

docs/log/2026-11-29-fresh-mean.md contains the protocol. The model and the data are those of
studies/optimizer_table.py; the seeds are new. Each mode is tuned on one seed and measured on five
others, and so is the optimizer without DoPr at each mode's rate. Finished runs are not repeated.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from tqdm import tqdm

from eval.command import command_parser
from eval.tables import markdown
from studies.optimizer_table import AUX_LR, EXACT, FAST, MODEL, RATES, RUN, run, summary, sweep
from studies.sweep.study import best_rate

MODES: dict[str, dict[str, Any]] = {
    "base": {},
    "exact": EXACT,
    "fast": FAST,
    "fresh mean": FAST | {"fresh_mean": True},
}
TUNING_SEED, FRESH_SEEDS = 10, (11, 12, 13, 14, 15)


def measure(variant: tuple[str, str]) -> dict[str, Any]:
    """Return the row of one optimizer and mode: its sweep, and its losses at the best rate."""
    optimizer, mode = variant
    losses = sweep(optimizer, MODES[mode], seed=TUNING_SEED)
    lr = best_rate(losses)
    fresh = [run(optimizer, lr, seed, **MODES[mode]) for seed in FRESH_SEEDS]
    base = [run(optimizer, lr, seed) for seed in FRESH_SEEDS]
    row = {"optimizer": optimizer, "mode": mode, "lr": lr, "sweep": losses, **summary(fresh)}
    return row | {"base_at_this_lr": base}


def difference(losses: list[float], reference: list[float]) -> str:
    """Return the mean paired difference with its 95 % t-interval."""
    pairs = [a - b for a, b in zip(losses, reference, strict=True)]
    mean = sum(pairs) / len(pairs)
    half = stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(pairs)
    return f"{mean:+.3f} ± {half:.3f}"


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return the table of the log: each mode against the base, and the other modes against it."""
    losses = {(row["optimizer"], row["mode"]): row["losses"] for row in rows}
    cells = []
    for row in rows:
        own, optimizer = row["losses"], row["optimizer"]
        against = [losses[optimizer, "base"], row["base_at_this_lr"], losses[optimizer, "fast"]]
        shown = [difference(own, each) if each != own else "" for each in against]
        mean = f"{row['mean']:.3f} ± {row['sd']:.3f}"
        cells.append((optimizer, row["mode"], f"{row['lr']:g}", mean, *shown))
    header = ("", "", "lr", "val loss, mean ± sd", "minus base", "minus base at this lr")
    return markdown((*header, "minus fast"), cells)


def main() -> None:
    parser = command_parser("studies.fresh_mean", __doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--optimizers", default="adamw,muon", help="comma-separated")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    arguments = parser.parse_args()
    optimizers = arguments.optimizers.split(",")
    if unknown := {*optimizers} - RATES.keys():
        parser.error(f"--optimizers: {', '.join(sorted(unknown))}: must be of {', '.join(RATES)}")
    variants = [(optimizer, mode) for optimizer in optimizers for mode in MODES]
    context = get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, context, torch.set_num_threads, (1,)) as pool:
        rows = list(tqdm(pool.map(measure, variants), total=len(variants)))
    result = {"model": MODEL, "run": RUN, "aux_lr": AUX_LR, "modes": MODES, "rows": rows}
    result |= {"tuning_seed": TUNING_SEED, "fresh_seeds": FRESH_SEEDS}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table_of(rows))


if __name__ == "__main__":
    main()
