"""Apply the rules of docs/log/2026-11-22-gpu-protocol.md to the results of GPU benchmarks.

    python -m bench.gpu decide [FOLDER]

Reads STEP.json and gpu_STAGE.json in FOLDER, which `python -m bench.gpu first` and other stages of
bench.gpu write. Prints what ran, what was measured, and what the rules say about it.
"""

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.first.plan import STEPS
from bench.kernel_rules import SHIPPED, is_accurate, ratio_to_torch
from eval.tables import aligned

STEP_BAR = 1.10  # of sampled mode
LOOP_BAR = 1.0  # nanoGPT's time over ours
LOSS_MARGIN = 0.01  # nats
Result = Mapping[str, Any]  # the content of a file: environment, rows, and of a step its outcome


class Decision(NamedTuple):
    """What was measured for one question of the protocol, and what follows from it."""

    question: str
    measured: str
    follows: str


def decide(results: Mapping[str, Result]) -> list[Decision]:
    """Return the decisions that follow from results, which are given by the names of their steps.

    A question without a row is listed as not measured.
    """
    rows = {name: result["rows"] for name, result in results.items()}
    checks = rows.pop("correctness", [])
    raised = [row for each in rows.values() for row in each if "exception" in row]
    rows = {name: [row for row in rows[name] if "exception" not in row] for name in rows}
    kernel_rows = [row for name in rows if name.startswith("kernels") for row in rows[name]]
    return [
        correctness(checks),
        *dict.fromkeys(failure(row) for row in raised),  # once, not in every round
        *kernel_choice(kernel_rows),
        *steps(rows.get("steps", [])),
        loop(rows.get("loop") or rows.get("throughput", [])),
        head(rows.get("head", [])),
        *pretraining(rows.get("pretraining", [])),
    ]


def failure(row: dict[str, Any]) -> Decision:
    """Return what follows from a measurement that raised an exception."""
    question = row.get("case") or f"step of {row['optimizer']}, {row['contender']}"
    return Decision(question, row["exception"].splitlines()[0][:80], "mend it, then repeat")


def unmeasured(question: str) -> Decision:
    return Decision(question, "not measured", "-")


def correctness(rows: list[dict[str, Any]]) -> Decision:
    question = "kernels against float64"
    if not rows:
        return unmeasured(question)
    wrong = [row["case"] for row in rows if not row["is_right"]]
    measured = f"{len(rows) - len(wrong)} of {len(rows)} cases are right"
    return Decision(
        question, measured, f"mend first: {'; '.join(wrong)}" if wrong else "none wrong"
    )


def kernel_choice(rows: list[dict[str, Any]]) -> Iterator[Decision]:
    """Where the shipped kernel is slower than torch, or inaccurate, `auto` does not choose it."""
    for operation, (shipped, tolerance) in SHIPPED.items():
        found = [row for row in rows if row["case"].split()[0] == operation]
        if not found:
            yield unmeasured(f"{operation}: Triton or torch")
        for row in found:
            ratio, is_right = ratio_to_torch(row), is_accurate(row)
            error = f"error {row['error'][shipped]:.0e}"
            error += "" if is_right else f" above {tolerance:.0e}"
            choice = "auto chooses Triton" if is_right and ratio <= 1 else "auto must choose torch"
            name = row["case"].partition(" iterations")[0]
            yield Decision(name, f"x {ratio:.2f} ms of torch, {error}", choice)


def steps(rows: list[dict[str, Any]]) -> Iterator[Decision]:
    """Compare step times within rounds; the protocol has a bar for sampled mode only."""
    ratios = step_ratios(rows)
    if not ratios:
        yield unmeasured("step of GPT-2 124M")
    for (optimizer, name), ratio in ratios.items():
        turns = [row for row in rows if (row["optimizer"], row["contender"]) == (optimizer, name)]
        ms, MiB = (statistics.median(row[key] for row in turns) for key in ("step_ms", "MiB"))
        measured = f"{ms:.1f} ms, x {ratio:.3f}, {MiB:,.0f} MiB, {len(turns)} rounds"
        is_met = f"bar of {STEP_BAR:.2f} {'met' if ratio <= STEP_BAR else 'missed'}"
        follows = is_met if name == "sampled" else "no bar"
        yield Decision(f"step of {optimizer}, {name}", measured, follows)


def step_ratios(rows: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Return each contender's median ratio to its base, over the rounds that have both."""
    keys = ("call", "round", "optimizer")
    bases = {
        tuple(row[key] for key in keys): row["step_ms"]
        for row in rows
        if row["contender"] == "base"
    }
    ratios: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if (base := bases.get(tuple(row[key] for key in keys))) is not None:
            name = row["optimizer"], row["contender"]
            ratios.setdefault(name, []).append(row["step_ms"] / base)
    return {name: statistics.median(values) for name, values in ratios.items()}


def loop(rows: list[dict[str, Any]]) -> Decision:
    question = "our loop against nanoGPT's"
    if not rows or "ratio" not in rows[-1]:
        return unmeasured(question)
    ratio = rows[-1]["ratio"]
    is_met = ratio >= LOOP_BAR
    measured = f"{ratio:.3f} of its tokens per second"
    return Decision(question, measured, f"bar of {LOOP_BAR:.1f} {'met' if is_met else 'missed'}")


def head(rows: list[dict[str, Any]]) -> Decision:
    question = "head over whole tiles"
    if not rows:
        return unmeasured(question)
    ratio = rows[-1]["ratio"]["whole tiles"]
    return Decision(question, f"x {ratio:.3f} ms", "keep it" if ratio < 1 else "remove it")


def pretraining(rows: list[dict[str, Any]]) -> Iterator[Decision]:
    """A faster precision ships if its loss is at most LOSS_MARGIN higher, by all fresh seeds."""
    if not rows:
        yield unmeasured("real run")
        return
    try:
        from bench.pretraining import FRESH_SEEDS, VARIANTS, comparison, fresh
    except ImportError as error:
        yield Decision("real run", f"{len(rows)} runs", f"cannot be compared here: {error}")
        return
    for variant, (_, base) in VARIANTS.items():
        if variant == "muon":
            continue
        baseline = "muon" if variant == base else base
        runs, base_runs = fresh(rows, variant), fresh(rows, baseline)
        question = f"{variant} against {baseline}"
        if any(run["has_diverged"] for run in runs.values()):
            yield Decision(question, "diverged", "does not ship")
            continue
        compared = comparison(runs, base_runs)
        if compared is None:
            yield unmeasured(question)
            continue
        d, ratio = compared
        measured = f"{d.mean:+.4f} [{d.lo:+.4f}, {d.hi:+.4f}] nats, x {ratio:.3f} ms, {d.n} seeds"
        follows = "three seeds are no headline"
        if d.n < len(FRESH_SEEDS):
            follows = f"wait for {len(FRESH_SEEDS)} seeds"
        elif variant != base:
            follows = "ships" if ratio < 1 and d.hi < LOSS_MARGIN else "does not ship"
        yield Decision(question, measured, follows)


def read_results(folder: Path) -> dict[str, Result]:
    """Return the results in a folder by the name of their step, in the order of the steps."""
    paths = {path.stem.removeprefix("gpu_"): path for path in sorted(folder.glob("*.json"))}
    names = sorted(paths, key=lambda name: [*STEPS, name].index(name))
    return {name: json.loads(paths[name].read_text()) for name in names}


def report(results: Mapping[str, Result]) -> str:
    """Return two tables: what ran, and what was measured with what follows from it."""
    ran = [
        (
            name,
            str(len(result["rows"])),
            result.get("outcome", "not part of `first`, or interrupted"),
        )
        for name, result in results.items()
    ]
    outcomes = aligned([("step", "rows", "outcome"), *ran])
    is_gpu = all("cuda" in result["environment"] for result in results.values())
    note = "" if is_gpu else "Not all of these results are from a GPU; others decide nothing.\n\n"
    return f"{note}{outcomes}\n\n{aligned([Decision._fields, *decide(results)])}"
