"""Compare DoPr with its base optimizers on validation loss; docs/log contains the protocol.

    python -m studies.optimizer_table --out studies/results/optimizer_table.json [--workers 2]

The table is {AdamW, Muon, Signum, AdaMuon} x {base, DoPr fast, DoPr exact} on pystdlib: a
learning-rate sweep on seed 0 for each, then fresh seeds at its best rate. The ablations change one
setting of fast DoPr at a time, on other seeds, at the best rate of fast DoPr. Finished runs are not
repeated.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.files import write_atomic
from eval.command import reported_errors
from eval.tables import markdown
from optim.build import MATRIX_OPTIMIZERS
from studies.pool import map_in_pool, pool_parser
from studies.sweep.run_cache import recorded
from studies.sweep.study import best_rate, search_rates
from studies.sweep.trial import model_settings, train_in
from studies.sweep.variants import EXACT_DOPR, FAST_DOPR

ROOT = Path(__file__).resolve().parent.parent
MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "bias": False}
RUN = {
    **{"dataset": "pystdlib", "batch_size": 32, "micro_batch_size": 32},  # 2,048 tokens a step
    **{"max_steps": 400, "warmup_steps": 40, "min_lr_ratio": 0.0, "weight_decay": 0.1},
    **{"eval_every": 400, "eval_batches": 64, "save_every": 400, "log_every": 50},
}
RATES = {  # the first grid; it grows by a factor of two while the best rate is at its edge
    "adamw": [2e-3, 4e-3, 8e-3, 1.6e-2],
    "muon": [4e-3, 8e-3, 1.6e-2, 3.2e-2],
    "signum": [2.5e-4, 5e-4, 1e-3, 2e-3],
    "adamuon": [4e-3, 8e-3, 1.6e-2, 3.2e-2],
}
KEY = hashlib.sha256(json.dumps([MODEL, RUN]).encode()).hexdigest()[:8]
RUNS = ROOT / "out" / f"optimizer_table-{KEY}"  # the fixed settings are in the name
AUX_LR = 4e-3  # of the AdamW beside muon and adamuon, with and without DoPr
FAST = {"dopr": True, "gamma": 0.1} | FAST_DOPR
EXACT = {"dopr": True, "gamma": 0.1, "sigma_beta": "none"} | EXACT_DOPR
MODES: dict[str, dict[str, Any]] = {"": {}, "dopr-": FAST, "exact dopr-": EXACT}
TUNING_SEED, ABLATION_SEEDS, FRESH_SEEDS = 0, (1, 2, 3), (4, 5, 6)
CHANGES: dict[str, dict[str, Any]] = {
    "unchanged": {},
    "gamma=0.01": {"gamma": 0.01},
    "gamma=1": {"gamma": 1.0},
    "sigma_beta=none": {"sigma_beta": "none"},
    "refresh_every=32": {"refresh_every": 32},
    "exact mode": {"sigma_beta": "none", "refresh_every": 1},
}


def run(optimizer: str, lr: float, seed: int, **changes: Any) -> float:
    """Return the final validation loss of one training run; infinite if it diverged.

    Raises TrialError if the run fails, or its folder contains a run with other settings.
    """
    settings = settings_of(optimizer, lr, seed, changes)
    varied = {
        key: settings[key] for key in (settings.keys() - (MODEL | RUN).keys()) | changes.keys()
    }
    out = RUNS / "_".join(f"{key}={value}" for key, value in sorted(varied.items()))
    command, metrics = command_of(settings, out), out / "metrics.jsonl"

    def make() -> dict[str, Any]:
        finished = '"event": "end", "reason": "finished"'
        is_trained = metrics.exists() and finished in metrics.read_text()
        return {"loss": final_loss(out) if is_trained or train_in(out, command) else None}

    loss = recorded(out, model_settings(command), make)["loss"]
    return math.inf if loss is None else loss


def settings_of(optimizer: str, lr: float, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of train.py for one run."""
    aux = {"aux_lr": AUX_LR} if optimizer in MATRIX_OPTIMIZERS else {}
    return MODEL | RUN | {"optimizer": optimizer, "lr": lr, "seed": seed} | aux | changes


def command_of(settings: dict[str, Any], out: Path) -> list[str]:
    """Return the words of the command that trains in the folder `out`."""
    words = [f"--{key}={value}" for key, value in settings.items()]
    return ["train.py", f"--out_dir={out}", "--device=cpu", *words]


def final_loss(out: Path) -> float:
    """Return the last validation loss of a finished run; infinite if it is not finite."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    loss = [row["loss"] for row in rows if row["kind"] == "val"][-1]
    return math.inf if loss is None else loss


def sweep(
    optimizer: str, changes: dict[str, Any], *, seed: int = TUNING_SEED
) -> dict[float, float]:
    """Return {learning rate: loss on the tuning seed}, with the best rate inside the grid."""
    return search_rates(lambda lr: run(optimizer, lr, seed, **changes), RATES[optimizer], optimizer)


def headline(variant: tuple[str, str]) -> dict[str, Any]:
    """Return one row: the sweep, and the fresh seeds at its best rate."""
    optimizer, mode = variant
    losses = sweep(optimizer, MODES[mode])
    lr = best_rate(losses)
    fresh = [run(optimizer, lr, seed, **MODES[mode]) for seed in FRESH_SEEDS]
    return {"name": mode + optimizer, "lr": lr, "sweep": losses, **summary(fresh)}


def change(task: tuple[str, float, str]) -> dict[str, Any]:
    """Return one row: fast DoPr with one setting changed, at the rate tuned without the change."""
    optimizer, lr, name = task
    losses = [run(optimizer, lr, seed, **FAST | CHANGES[name]) for seed in ABLATION_SEEDS]
    return {"name": f"dopr-{optimizer}", "change": name, "lr": lr, **summary(losses)}


def summary(losses: list[float]) -> dict[str, Any]:
    """Return the losses with their mean and spread; an infinite mean if a run diverged."""
    if not all(map(math.isfinite, losses)):
        return {"losses": losses, "mean": math.inf, "sd": math.nan}
    return {"losses": losses, "mean": statistics.mean(losses), "sd": statistics.stdev(losses)}


def table_of(rows: Iterable[dict[str, Any]]) -> str:
    cells = [
        (
            ", ".join(row[key] for key in ("name", "change") if key in row),
            f"{row['lr']:g}",
            f"{row['mean']:.4f} ± {row['sd']:.4f}",
        )
        for row in rows
    ]
    return markdown(("", "lr", "val loss, mean ± sd of 3 seeds"), cells)


def main() -> None:
    parser = pool_parser("studies.optimizer_table", __doc__)
    arguments = parser.parse_args()
    with reported_errors(parser):
        variants = [(optimizer, mode) for optimizer in RATES for mode in MODES]
        table = map_in_pool(headline, variants, arguments.workers, "headline")
        best = {row["name"]: row["lr"] for row in table}
        tasks = [
            (base, best[f"dopr-{base}"], name) for name in CHANGES for base in ("adamw", "muon")
        ]
        changes = map_in_pool(change, tasks, arguments.workers, "ablations")
        result = {"model": MODEL, "run": RUN, "aux_lr": AUX_LR, "modes": MODES}
        result |= {"fresh_seeds": FRESH_SEEDS, "ablation_seeds": ABLATION_SEEDS}
        result |= {"table": table, "ablations": changes}
        write_atomic(arguments.out, json.dumps(result, indent=2) + "\n")
        print(table_of(table), table_of(changes), sep="\n\n")


if __name__ == "__main__":
    main()
