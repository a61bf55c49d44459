"""Compare `fresh_mean` with exact mode, fast mode and no DoPr on validation loss.

    python -m studies.fresh_mean.comparison --out FILE --optimizers adamw,muon
    python -m studies.fresh_mean.comparison --out FILE --optimizers adamw --setups width-128

docs/log/2026-11-29-fresh-mean.md contains the protocol. The model and the data are those of
studies/optimizer_table.py; the seeds are new. Each mode is tuned on one seed and measured on five
others, and so is the optimizer without DoPr at each mode's rate. Finished runs are not repeated,
and the rows of earlier commands in FILE are kept.
"""

import json
from itertools import product
from typing import Any

from eval.command import reported_errors
from eval.tables import markdown
from studies.optimizer_table import (
    AUX_LR,
    EXACT,
    FAST,
    MODEL,
    RATES,
    ROOT,
    RUN,
    run,
    summary,
    sweep,
)
from studies.pool import map_in_pool, pool_parser
from studies.rows import check_header, load_rows, write_rows
from studies.stats.seeds import over_seeds
from studies.sweep.study import best_rate

MODES: dict[str, dict[str, Any]] = {
    "base": {},
    "exact": EXACT,
    "fast": FAST,
    "fresh mean": FAST | {"fresh_mean": True},
}


def _steps(n: int, sequences: int) -> dict[str, int]:
    """Return the settings of n steps, with the same number of validation tokens for all sizes."""
    lengths = {"max_steps": n, "warmup_steps": n // 10, "eval_every": n, "save_every": n}
    sizes = {"batch_size": sequences, "micro_batch_size": min(sequences, 32)}
    return lengths | sizes | {"eval_batches": RUN["eval_batches"] * RUN["batch_size"] // sequences}


SETUPS: dict[str, dict[str, Any]] = {  # what they change, for all modes
    "plain": {},
    **{  # of the tied embedding, which is also the output head
        f"embedding-lr-{lr:g}": {"embedding_lr": lr} for lr in (4e-3, 1.6e-2, 3.2e-2, 6.4e-2)
    },
    "tokens-512": _steps(1600, 8),
    **{  # in small batches, too
        f"tokens-512-embedding-lr-{lr:g}": _steps(1600, 8) | {"embedding_lr": lr}
        for lr in (1.6e-2, 6.4e-2)
    },
    "tokens-8192": _steps(100, 128),
    "width-128": {"n_embd": 128},
    "width-256": {"n_embd": 256},
}
RESULTS = ROOT / "studies" / "results" / "fresh_mean.json"
TUNING_SEED, FRESH_SEEDS = 10, (11, 12, 13, 14, 15)


def measure(variant: tuple[str, str, str]) -> dict[str, Any]:
    """Return a row: the sweep of a (setup, optimizer, mode), and its losses at the best rate."""
    setup, optimizer, mode = variant
    settings = SETUPS[setup] | MODES[mode]
    losses = sweep(optimizer, settings, seed=TUNING_SEED)
    lr = best_rate(losses)
    fresh = [run(optimizer, lr, seed, **settings) for seed in FRESH_SEEDS]
    row = {"setup": setup, "optimizer": optimizer, "mode": mode, "lr": lr, "sweep": losses}
    return row | summary(fresh)


def base_losses(at: tuple[str, str, float]) -> list[float]:
    """Return the losses without DoPr of a setup and optimizer at a rate, on the fresh seeds."""
    setup, optimizer, lr = at
    return [run(optimizer, lr, seed, **SETUPS[setup]) for seed in FRESH_SEEDS]


def rows_of(variants: list[tuple[str, str, str]], workers: int) -> list[dict[str, Any]]:
    """Return the rows of all variants, with the losses of the base at their rates.

    These come last and once for each rate, because modes may share them.
    """
    rows = map_in_pool(measure, variants, workers, "modes")
    places = [(row["setup"], row["optimizer"], row["lr"]) for row in rows]
    distinct = list(dict.fromkeys(places))
    found = dict(zip(distinct, map_in_pool(base_losses, distinct, workers, "bases"), strict=True))
    return [row | {"base_at_this_lr": found[at]} for row, at in zip(rows, places, strict=True)]


def key_of(row: dict[str, Any]) -> tuple[str, str, str]:
    """Return (setup, optimizer, mode) of a row."""
    return row["setup"], row["optimizer"], row["mode"]


def row_in(optimizer: str, mode: str, setup: str = "plain") -> dict[str, Any]:
    """Return the committed row of an optimizer, mode and setup. Raises ValueError without one."""
    for row in json.loads(RESULTS.read_text())["rows"]:
        if key_of(row) == (setup, optimizer, mode):
            return row
    raise ValueError(
        f"{optimizer}: {RESULTS.name} has no {mode} of it; run studies.fresh_mean.comparison first"
    )


def tuned_rates(optimizers: str) -> dict[str, float]:
    """Return {optimizer: rate of fresh mean} of a comma-separated list."""
    return {name: row_in(name, "fresh mean")["lr"] for name in optimizers.split(",")}


def difference(losses: list[float], reference: list[float]) -> str:
    """Return the mean paired difference with its 95 % t-interval."""
    found = over_seeds([a - b for a, b in zip(losses, reference, strict=True)])
    return f"{found.mean:+.3f} ± {found.hi - found.mean:.3f}"


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return the table of the log: each mode against the base, and the other modes against it."""
    losses = {key_of(row): row["losses"] for row in rows}
    cells = []
    for row in rows:
        own, (setup, optimizer, mode) = row["losses"], key_of(row)
        base, fast = (losses.get((setup, optimizer, other)) for other in ("base", "fast"))
        against = [base, row["base_at_this_lr"], fast]
        shown = [difference(own, each) if each and each != own else "" for each in against]
        mean = f"{row['mean']:.3f} ± {row['sd']:.3f}"
        cells.append((setup, optimizer, mode, f"{row['lr']:g}", mean, *shown))
    header = ("setup", "", "", "lr", "val loss, mean ± sd", "minus base", "minus base at this lr")
    return markdown((*header, "minus fast"), cells)


def main() -> None:
    parser = pool_parser("studies.fresh_mean.comparison", __doc__)
    parser.add_argument("--optimizers", default="adamw,muon", help="comma-separated")
    parser.add_argument("--setups", default="plain", help=f"of {', '.join(SETUPS)}")
    parser.add_argument("--modes", default=",".join(MODES), help="comma-separated")
    arguments = parser.parse_args()
    known_names = {"optimizers": RATES, "setups": SETUPS, "modes": MODES}
    chosen = {flag: getattr(arguments, flag).split(",") for flag in known_names}
    for flag, known in known_names.items():
        if unknown := {*chosen[flag]} - known.keys():
            parser.error(f"--{flag}: {', '.join(sorted(unknown))}: must be of {', '.join(known)}")
    variants = list(product(chosen["setups"], chosen["optimizers"], chosen["modes"]))
    header = {"model": MODEL, "run": RUN, "aux_lr": AUX_LR, "modes": MODES, "setups": SETUPS}
    header |= {"tuning_seed": TUNING_SEED, "fresh_seeds": FRESH_SEEDS}
    with reported_errors(parser):
        check_header(arguments.out, key_of, header)  # before hours of work
        write_rows(arguments.out, rows_of(variants, arguments.workers), key_of, header)
        print(table_of([*load_rows(arguments.out, key_of).values()]))


if __name__ == "__main__":
    main()
