"""Train GPT-2 with Muon, with DoPr-Muon and with DoPr in other precisions, on equal tokens.

    python -m bench.pretraining [--seconds 540] --out FILE

Trains GPT-2 124M (87M weights with a vocabulary of 2,048) with config/gpt2_muon.py and
config/gpt2_dopr_muon.py on `pystdlib`: 300 steps of 65,536 tokens, which is more than five epochs.
First the learning rate of both is swept on a tuning seed, by validation loss. Then each fresh seed
trains all variants in turn: Muon and DoPr-Muon at their best learning rates, and, at DoPr-Muon's
learning rate, DoPr-Muon with bf16 weight gradients, with G P in bf16x3 and with G P in fp32 (see
bench/precisions.py). The result keeps the curves of validation loss and of rollout survival of each
run, and its step time. Needs a GPU; --tiny trains tiny models in seconds on any machine.

The command continues the runs in FILE. It makes at least one run, and starts no further run that
would exceed --seconds; repeat the command to continue. At the end it prints means over the fresh
seeds. DoPr-Muon is compared with Muon, and every other variant with DoPr-Muon, by the difference in
loss and the ratio of step times, paired by seed.
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
from bench.results import write_rows
from bench.timing import DEVICE, facts
from data.schema import OpenSchema, read_json
from data.shards import DataError
from eval.command import command_parser, leave_on_signals
from eval.rollout.intervals import Estimate
from studies.stats.seeds import paired
from studies.sweep.study import best_rate, further_rate
from train import EXIT_DIVERGED

ROOT = Path(__file__).resolve().parent.parent
TUNING_SEED, FRESH_SEEDS = 0, (200, 201, 202)
RATES = (1e-3, 2e-3, 4e-3)  # A sweep extends these by factors of 2 while its best is at an edge.
MAX_RATES = 8
WARMUP_ROWS = 2  # The first logged step times include compilation and are left out.
SWEPT = {"muon": "muon", "dopr-muon": "dopr_muon"}  # variant: config/gpt2_<name>.py
VARIANTS = {  # variant: change of bench/precisions.py, and the swept variant that it is based on
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
DOPR_ONLY = ("block_diagonal", "refresh_every", "collect_every")


class PretrainingRun(NamedTuple):
    """The parameters of one run."""

    variant: str
    lr: float
    seed: int


PretrainingRow = dict[str, Any]  # the fields of a PretrainingRun, and its results


class StoredRow(OpenSchema):
    """The keys of a row that decide which run is next and that the table shows."""

    variant: str
    lr: float
    seed: int
    seconds: float
    has_diverged: bool
    loss: float | None
    survival: float | None
    step_ms: float | None


class FixedFacts(OpenSchema):
    """The facts that must be equal to continue a result."""

    device: str
    settings: dict[str, Any]


class PretrainingResult(OpenSchema):
    """The file that this benchmark continues."""

    environment: FixedFacts
    rows: list[StoredRow]


def next_run(rows: list[PretrainingRow]) -> PretrainingRun | None:
    """Return the next run after those in `rows`, or None if all are done."""
    done = {PretrainingRun(row["variant"], row["lr"], row["seed"]) for row in rows}
    sweeps = {variant: sweep(rows, variant) for variant in SWEPT}
    for variant in sorted(SWEPT, key=lambda variant: len(sweeps[variant])):  # in turns
        lr = next_rate(sweeps[variant])
        if lr is not None:
            return PretrainingRun(variant, lr, TUNING_SEED)
    rates = {variant: best_rate(sweep(rows, variant)) for variant in SWEPT}
    runs = (
        PretrainingRun(variant, rates[base], seed)
        for seed in FRESH_SEEDS
        for variant, (_, base) in VARIANTS.items()
    )
    return next((run for run in runs if run not in done), None)


def sweep(rows: list[PretrainingRow], variant: str) -> dict[float, float]:
    """Return the validation loss at each learning rate tried. A diverged run counts as infinite."""
    tuning = [row for row in rows if row["variant"] == variant and row["seed"] == TUNING_SEED]
    return {row["lr"]: math.inf if row["loss"] is None else row["loss"] for row in tuning}


def next_rate(losses: dict[float, float]) -> float | None:
    """Return the next learning rate of a sweep, or None if the sweep is complete.

    Raises RuntimeError if the run diverged at every learning rate.
    """
    for lr in RATES:
        if lr not in losses:
            return lr
    best = best_rate(losses)
    if math.isinf(losses[best]):
        raise RuntimeError(f"every learning rate diverged: {', '.join(map(str, losses))}")
    return further_rate(losses) if len(losses) < MAX_RATES else None


def train(run: PretrainingRun, out: Path, settings: dict[str, Any]) -> PretrainingRow:
    """Train in a subprocess and return the row of the run.

    Raises RuntimeError if training fails for another reason than divergence.
    """
    change, base = VARIANTS[run.variant]
    settings = settings | {"lr": run.lr, "seed": run.seed, "out_dir": out, "device": DEVICE.type}
    excluded = DOPR_ONLY if base == "muon" else ()
    command = [sys.executable, "-m", "bench.precisions", change, f"config/gpt2_{SWEPT[base]}.py"]
    command += [f"--{key}={value}" for key, value in settings.items() if key not in excluded]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, EXIT_DIVERGED):
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    row = run._asdict() | {"seconds": time.perf_counter() - started}
    return row | curves(out, has_diverged=bool(done.returncode))


def curves(out: Path, *, has_diverged: bool) -> PretrainingRow:
    """Read a run's metrics: loss and rollout survival by step and at the end, and its step time."""
    rows: dict[str, list[PretrainingRow]] = {"train": [], "val": [], "ttf": [], "run": []}
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


def table(rows: list[PretrainingRow]) -> Iterator[str]:
    """Yield one line per sweep, then one line per variant over the fresh seeds run so far."""
    for variant in SWEPT:
        rates = (f"{lr:g}: {loss:.4f}" for lr, loss in sorted(sweep(rows, variant).items()))
        yield f"{variant}, val loss by learning rate: {', '.join(rates)}"
    for variant, (_, base) in VARIANTS.items():
        runs = fresh(rows, variant)
        baseline = "muon" if variant == base else base
        baseline_runs = fresh(rows, baseline) if variant != "muon" else {}
        if any(run["has_diverged"] for run in runs.values()) or not runs:
            yield f"{variant:26} {'diverged' if runs else 'not run yet'}"
            continue
        figures = (f"{key} {mean(runs, key):.4f}" for key in ("loss", "survival", "step_ms"))
        comparison = difference(runs, baseline_runs)
        yield f"{variant:26} {'  '.join(figures)}  {len(runs)} seeds  {comparison}"


def fresh(rows: list[PretrainingRow], variant: str) -> dict[int, PretrainingRow]:
    """Return the runs of a variant on the fresh seeds, by seed."""
    found = [row for row in rows if row["variant"] == variant and row["seed"] != TUNING_SEED]
    return {row["seed"]: row for row in found}


def mean(runs: dict[int, PretrainingRow], key: str) -> float:
    return statistics.mean(run[key] for run in runs.values())


def difference(runs: dict[int, PretrainingRow], baseline_runs: dict[int, PretrainingRow]) -> str:
    """Describe the difference in loss, with a 95 % interval, and the median ratio of step times."""
    compared = comparison(runs, baseline_runs)
    if compared is None:
        return ""
    (d, ratio), name = compared, next(iter(baseline_runs.values()))["variant"]
    return f"{d.mean:+.4f} [{d.lo:+.4f}, {d.hi:+.4f}] nats, x {ratio:.3f} ms of {name}"


def comparison(
    runs: dict[int, PretrainingRow], baseline_runs: dict[int, PretrainingRow]
) -> tuple[Estimate, float] | None:
    """Compare runs by seed: return the difference in loss and the median ratio of step times.

    Return None if no seed has both.
    """
    seeds = [s for s in runs if s in baseline_runs and not baseline_runs[s]["has_diverged"]]
    if not seeds:
        return None
    pairs = [[side[seed] for seed in seeds] for side in (runs, baseline_runs)]
    loss = paired(*([row["loss"] for row in side] for side in pairs)).difference
    return loss, statistics.median(a["step_ms"] / b["step_ms"] for a, b in zip(*pairs, strict=True))


def read_rows(path: Path, environment: dict[str, Any]) -> list[PretrainingRow]:
    """Read the rows of an earlier call.

    Raises ValueError if the file is damaged, or if it has another device or other settings.
    """
    if not path.exists():
        return []
    try:
        stored = read_json(path, PretrainingResult).environment.model_dump()
    except DataError as problem:
        raise ValueError(f"{problem}; move the file away") from None
    current = {key: environment[key] for key in stored}
    if stored != current:
        raise ValueError(f"{path} has runs with {stored}, not {current}; give another --out")
    return json.loads(path.read_text())["rows"]


def run_missing(
    rows: list[PretrainingRow], environment: dict[str, Any], out: Path, seconds: float
) -> None:
    """Make the missing runs and write each row at once, until the next run may exceed `seconds`.

    The first run is made in any case.
    """
    started, n_before = time.perf_counter(), len(rows)
    versions = {key: environment[key] for key in ("git", "torch")}
    while run := next_run(rows):
        longest = max((row["seconds"] for row in rows), default=0.0)
        if len(rows) > n_before and time.perf_counter() - started + longest > seconds:
            print(f"{len(rows)} runs are done, more are left; repeat the command to continue")
            return
        with tempfile.TemporaryDirectory() as folder:
            rows.append(train(run, Path(folder) / "run", environment["settings"]) | versions)
        figures = (f"{key} {rows[-1][key]}" for key in ("loss", "survival", "step_ms"))
        print(*run, *figures, flush=True)
        write_rows(out, environment, rows)
    print("all runs are done")


def main() -> None:
    parser = command_parser("bench.pretraining", __doc__)
    parser.add_argument("--seconds", type=float, default=540, help="time limit of this call")
    parser.add_argument("--tiny", action="store_true", help="train a tiny model on any machine")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write or continue")
    arguments = parser.parse_args()
    require_gpu(parser, arguments.tiny or DEVICE.type == "cuda")
    settings = TINY if arguments.tiny else SETTINGS
    environment = facts(DEVICE) | {"settings": settings}
    try:
        rows = read_rows(arguments.out, environment)
        run_missing(rows, environment, arguments.out, arguments.seconds)
    except (ValueError, RuntimeError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    leave_on_signals()  # removes the temporary folders on a signal
    main()
