"""Muon against DoPr-Muon on GPT-2 at the same tokens, and what two precisions do to DoPr: on a GPU.

    python -m bench.pretraining [--seconds 540] --out FILE

GPT-2 124M (87M weights with a vocabulary of 2,048) by config/gpt2_muon.py and config/gpt2_dopr.py
on `pystdlib`: 300 steps of 65,536 tokens, more than five passes over it. First the learning rate of
both is swept on a tuning seed, by validation loss; then fresh seeds run at the best, one after the
other, each with all variants: as shipped, with bf16 weight gradients, and with G P in bf16x3 and in
fp32 (bench/precisions.py), at DoPr-Muon's rate. Kept of a run: its curves of validation loss and of
own rollouts, and the time of its steps. --tiny is the same in seconds, on any machine.

Runs that FILE holds are not repeated, and after the first none is started that would take longer
than --seconds: call it again to go on. The table at the end has means over fresh seeds, and loss
and step time against DoPr-Muon's, of that against Muon's, paired by seed.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.arguments import require_gpu
from bench.timing import DEVICE, facts, write_rows
from eval.command import command_parser, leave_on_signals
from studies.stats.seeds import paired
from studies.sweep.study import best_rate, further_rate
from train import EXIT_DIVERGED

ROOT = Path(__file__).resolve().parent.parent
TUNING_SEED, FRESH_SEEDS = 0, (200, 201, 202)
RATES = (1e-3, 2e-3, 4e-3)  # of a sweep, which goes on by factors of 2 while its edge is best
MAX_RATES = 8
WARMUP_ROWS = 2  # logged step times that are not measured: of compilation, and of its end
SWEPT = {"muon": "muon", "dopr-muon": "dopr"}  # and its config file
VARIANTS = {  # what is changed (bench/precisions.py), and whose config file and rate it has
    "muon": ("shipped", "muon"),
    "dopr-muon": ("shipped", "dopr-muon"),
    "dopr-muon, bf16 gradients": ("bf16_gradients", "dopr-muon"),
    "dopr-muon, bf16x3 G P": ("bf16x3_apply", "dopr-muon"),
    "dopr-muon, fp32 G P": ("ieee_apply", "dopr-muon"),
}
SETTINGS = {
    **{"dataset": "pystdlib", "batch_size": 64, "micro_batch_size": 64, "eval_batches": 0},
    **{"max_steps": 300, "warmup_steps": 30, "eval_every": 100, "save_every": 300},
    **{"ttf_every": 100, "ttf_episodes": 512, "log_every": 10},
}
TINY = SETTINGS | {
    **{"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 96, "compile": False},
    **{"batch_size": 2, "micro_batch_size": 2, "eval_batches": 1, "backend": "triton"},
    **{"max_steps": 6, "warmup_steps": 1, "eval_every": 6, "save_every": 6, "block_diagonal": 16},
    **{"ttf_every": 6, "ttf_episodes": 2, "log_every": 1, "refresh_every": 2, "collect_every": 2},
}
FIXED = ("device", "settings")  # of a result that is continued
DOPR_ONLY = ("block_diagonal", "refresh_every", "collect_every")


class Run(NamedTuple):
    """What makes a run."""

    variant: str
    lr: float
    seed: int


LeaderboardRow = dict[str, Any]  # a Run, and what came of it


def next_run(rows: list[LeaderboardRow]) -> Run | None:
    """What is to be run after these; None: nothing."""
    done = {Run(row["variant"], row["lr"], row["seed"]) for row in rows}
    for variant in SWEPT:
        lr = next_rate(sweep(rows, variant))
        if lr is not None:
            return Run(variant, lr, TUNING_SEED)
    rates = {variant: best_rate(sweep(rows, variant)) for variant in SWEPT}
    wanted = (
        Run(v, rates[base], seed) for seed in FRESH_SEEDS for v, (_, base) in VARIANTS.items()
    )
    return next((run for run in wanted if run not in done), None)


def sweep(rows: list[LeaderboardRow], variant: str) -> dict[float, float]:
    """Validation loss at the rates that were tried; of a run that diverged, infinite."""
    tuning = [row for row in rows if row["variant"] == variant and row["seed"] == TUNING_SEED]
    return {row["lr"]: math.inf if row["loss"] is None else row["loss"] for row in tuning}


def next_rate(losses: dict[float, float]) -> float | None:
    """The next learning rate of a sweep; None: its best is known.

    Raises RuntimeError if every rate that was tried diverged.
    """
    for lr in RATES:
        if lr not in losses:
            return lr
    best = best_rate(losses)
    if math.isinf(losses[best]):
        raise RuntimeError(f"every learning rate diverged: {', '.join(map(str, losses))}")
    return further_rate(losses) if len(losses) < MAX_RATES else None


def train(run: Run, out: Path, settings: dict[str, Any]) -> LeaderboardRow:
    """Train in a process of its own. RuntimeError if that failed other than by diverging."""
    change, base = VARIANTS[run.variant]
    settings = settings | {"lr": run.lr, "seed": run.seed, "out_dir": out, "device": DEVICE.type}
    left_out = DOPR_ONLY if base == "muon" else ()
    command = [sys.executable, "-m", "bench.precisions", change, f"config/gpt2_{SWEPT[base]}.py"]
    command += [f"--{key}={value}" for key, value in settings.items() if key not in left_out]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, EXIT_DIVERGED):
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    row = run._asdict() | {"seconds": time.perf_counter() - started}
    return row | curves(out, has_diverged=bool(done.returncode))


def curves(out: Path, *, has_diverged: bool) -> LeaderboardRow:
    """Validation loss and survival of own rollouts by step, and at the end; milliseconds a step."""
    rows: dict[str, list[LeaderboardRow]] = {"train": [], "val": [], "ttf": [], "run": []}
    for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        rows[row["kind"]].append(row)
    timed = rows["train"][WARMUP_ROWS:]
    return {
        "has_diverged": has_diverged,
        "val": [[row["step"], row["loss"]] for row in rows["val"]],
        "ttf": [[row["step"], row["survival"]] for row in rows["ttf"]],
        "loss": None if has_diverged else rows["val"][-1]["loss"],
        "survival": None if has_diverged else rows["ttf"][-1]["survival"],
        "step_ms": statistics.median(row["step_ms"] for row in timed) if timed else None,
        "mfu": timed[-1]["mfu"] if timed else None,
    }


def table(rows: list[LeaderboardRow]) -> Iterator[str]:
    """The sweeps; then a line a variant, over the fresh seeds that are there, paired by seed."""
    for variant in SWEPT:
        rates = (f"{lr:g}: {loss:.4f}" for lr, loss in sorted(sweep(rows, variant).items()))
        yield f"{variant}, val loss by learning rate: {', '.join(rates)}"
    for variant, (_, base) in VARIANTS.items():
        runs = fresh(rows, variant)
        others = fresh(rows, "muon" if variant == base else base) if variant != "muon" else {}
        if any(run["has_diverged"] for run in runs.values()) or not runs:
            yield f"{variant:26} {'diverged' if runs else 'not run yet'}"
            continue
        figures = (f"{key} {mean(runs, key):.4f}" for key in ("loss", "survival", "step_ms"))
        yield f"{variant:26} {'  '.join(figures)}  {len(runs)} seeds  {against(runs, others)}"


def fresh(rows: list[LeaderboardRow], variant: str) -> dict[int, LeaderboardRow]:
    """The runs of a variant by their seed, but for the tuning seed's."""
    found = [row for row in rows if row["variant"] == variant and row["seed"] != TUNING_SEED]
    return {row["seed"]: row for row in found}


def mean(runs: dict[int, LeaderboardRow], key: str) -> float:
    return statistics.mean(run[key] for run in runs.values())


def against(runs: dict[int, LeaderboardRow], others: dict[int, LeaderboardRow]) -> str:
    """Loss minus that of others, with a 95 % interval, and the median ratio of step times."""
    seeds = [seed for seed in runs if seed in others and not others[seed]["has_diverged"]]
    if not seeds:
        return ""
    pairs = [[each[seed] for seed in seeds] for each in (runs, others)]
    d = paired(*([row["loss"] for row in side] for side in pairs)).difference
    ratio = statistics.median(a["step_ms"] / b["step_ms"] for a, b in zip(*pairs, strict=True))
    name = others[seeds[0]]["variant"]
    return f"{d.mean:+.4f} [{d.lo:+.4f}, {d.hi:+.4f}] nats, x {ratio:.3f} ms of {name}"


def rows_of(path: Path, environment: dict[str, Any]) -> list[LeaderboardRow]:
    """What an earlier call measured. ValueError if on another device or with other settings."""
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
        rows, there = found["rows"], {key: found["environment"][key] for key in FIXED}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of this command ({error!r}); move it away") from None
    here = {key: environment[key] for key in FIXED}
    if there != here:
        raise ValueError(f"{path} has runs of {there}, here it is {here}; use another")
    return rows


def main() -> None:
    parser = command_parser("bench.pretraining", __doc__)
    parser.add_argument("--seconds", type=float, default=540, help="of this call, all runs")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on any machine")
    parser.add_argument("--out", type=Path, required=True, help="the result, as JSON")
    arguments = parser.parse_args()
    require_gpu(parser, arguments.tiny or DEVICE.type == "cuda")
    settings = TINY if arguments.tiny else SETTINGS
    environment = facts(DEVICE) | {"settings": settings}
    try:
        rows = rows_of(arguments.out, environment)
        go_on(rows, environment, arguments.out, arguments.seconds)
    except (ValueError, RuntimeError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(*table(rows), sep="\n")


def go_on(
    rows: list[LeaderboardRow], environment: dict[str, Any], out: Path, seconds: float
) -> None:
    """Do the runs that are missing, the first whatever it takes, and keep each at once."""
    started, n_before = time.perf_counter(), len(rows)
    versions = {key: environment[key] for key in ("git", "torch")}
    while run := next_run(rows):
        longest = max((row["seconds"] for row in rows), default=0.0)
        if len(rows) > n_before and time.perf_counter() - started + longest > seconds:
            print(f"{len(rows)} runs are done, not all: the same command goes on")
            return
        with tempfile.TemporaryDirectory() as folder:
            rows.append(train(run, Path(folder) / "run", environment["settings"]) | versions)
        figures = (f"{key} {rows[-1][key]}" for key in ("loss", "survival", "step_ms"))
        print(*run, *figures, flush=True)
        write_rows(out, environment, rows)
    print("all runs are done")


if __name__ == "__main__":
    leave_on_signals()  # and so remove the runs
    main()
