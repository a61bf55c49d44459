"""A study: what is compared on what, its sweeps and fresh runs, on a pool of processes.

The learning rate of each optimizer is swept on tuning seeds over a factor-2 grid, which grows while
the best rate is at its edge; the best has the lowest *validation* loss. Fresh seeds, on which
nothing was tuned, run at that rate; they alone are reported.
"""

import contextlib
import json
import math
import statistics
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from eval.rollout.record import write_records
from eval.rollout.tasks import Task
from eval.rollout.tasks.lds import Lds
from optim.build import MATRIX_OPTIMIZERS
from studies.stats.analysis import Record, primary, val_loss
from studies.sweep.reference import references_of
from studies.sweep.runner import Runner
from studies.sweep.trial import Trial, run_trial
from studies.sweep.variants import Variant
from trainer.checkpoint.read import write_atomic

FRESH = 200  # the first fresh seed; tuning seeds are 0, 1, ...
GRIDS = {  # the first learning rates
    "adamw": (2e-3, 4e-3, 8e-3),
    "sgd": (0.1, 0.2, 0.4),
    "signum": (5e-4, 1e-3, 2e-3),
    "muon": (8e-3, 1.6e-2, 3.2e-2),
    "adamuon": (8e-3, 1.6e-2, 3.2e-2),
}
DEFAULT_GRID = (5e-4, 1e-3, 2e-3)  # of an optimizer that has none: a factor 2 around 1e-3
MAX_RATES = 16  # of a sweep: a loss that falls all the way is no sweep
AUX_LR = 4e-3  # of the AdamW beside matrix optimizers, with and without DoPr


class SweepError(RuntimeError):
    """No learning rate of a sweep is the best one: a result, of this variant alone."""


@dataclass(frozen=True)
class Study:
    """What is compared, on what, and where the results go."""

    out: Path
    task: Task | Lds
    variants: tuple[Variant, ...]
    steps: int
    tuning_seeds: int
    fresh_seeds: int
    n: int  # episodes of a grading
    settings: dict[str, Any]  # of train.py, for all variants

    @property
    def seeds(self) -> range:
        """The fresh ones, which are reported."""
        return range(FRESH, FRESH + self.fresh_seeds)

    def point(self, variant: Variant, role: str, lr: float, seed: int) -> Trial:
        """One run. A seed is also the task's instance, if the task has any."""
        has_instances = any(field.name == "instance" for field in fields(self.task))
        has_aux = variant.optimizer in MATRIX_OPTIMIZERS and "aux_lr" not in self.settings
        aux = {"aux_lr": AUX_LR} if has_aux and isinstance(self.task, Task) else {}
        return Trial(
            folder=run_folder(self.out, variant.name, lr, seed),
            task=replace(self.task, instance=seed) if has_instances else self.task,
            variant=variant.name,
            base=variant.base,
            role=role,
            lr=lr,
            seed=seed,
            settings={"max_steps": self.steps} | self.settings | aux | dict(variant.settings),
            n=self.n,
        )

    def references(self) -> list[Trial]:
        """The source and two extremes beside it, on the instances of the fresh seeds."""
        names = references_of(self.task)
        rows = [Variant(name, name, ()) for name in names]
        return [self.point(row, "reference", 0.0, seed) for row in rows for seed in self.seeds]

    def controls(self, rates: dict[str, float]) -> list[Trial]:
        """Each base on the fresh seeds at its variants' rates: what of a gain is the rate's?

        rates: of every variant that has one. Without its base among them it has no control.
        """
        tuned = [each for each in self.variants if each.name in rates]
        bases = {each.name: each for each in tuned if each.name == each.base}
        others = {(each.base, rates[each.name]) for each in tuned if each.base in bases}
        others -= {(name, rates[name]) for name in bases}
        return [
            self.point(bases[name], "control", lr, seed)
            for name, lr in sorted(others)
            for seed in self.seeds
        ]

    def fixed(self) -> dict[str, Any]:
        """What must not change between two commands on the same folder."""
        numbers = {key: getattr(self, key) for key in ("steps", "tuning_seeds", "n", "settings")}
        return {"task": self.task.name, "spec": self.task.spec} | numbers

    def begin(self, command: str) -> None:
        """Write protocol.json, united with the one that is there.

        ValueError if that has other fixed settings, or another variant of the same name.
        """
        path = self.out / "protocol.json"
        fixed = json.loads(json.dumps(self.fixed()))
        variants = {variant.name: dict(variant.settings) for variant in self.variants}
        found = {**fixed, "variants": {}, "fresh_seeds": [], "command": ""}
        if path.exists():
            found = _protocol(path, wanted=found)
        there = found["variants"]
        changed = [key for key in fixed if found.get(key) != fixed[key]]
        changed += [name for name in variants if there.get(name, variants[name]) != variants[name]]
        if changed:
            raise ValueError(
                f"--out={self.out} holds a study with another {', '.join(changed)}; use another"
            )
        seeds = {*found["fresh_seeds"], *self.seeds}
        protocol = fixed | {
            "variants": there | variants,
            "fresh_seeds": sorted(seeds),
            "select": "val_loss",
            "command": "\n".join(dict.fromkeys([*found["command"].splitlines(), command])),
        }
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(protocol, indent=1) + "\n")

    def check(self) -> None:
        """ValueError for a variant that cannot be trained on these settings."""
        for variant in self.variants:
            try:
                self.point(variant, "tuning", first_rates(variant.optimizer)[0], 0).asked()
            except ValueError as error:
                raise ValueError(f"{variant.name}: {error}") from error


def _protocol(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """What a study was before. ValueError: it is no protocol."""
    try:
        found = json.loads(path.read_text())
        if lacks := wanted.keys() - found.keys():
            raise ValueError(f"it lacks {', '.join(sorted(lacks))}")
    except ValueError as error:
        raise ValueError(f"{path}: no protocol ({error}); use another --out") from None
    return found


def run_folder(out: Path, variant: str, lr: float, seed: int) -> Path:
    """Where a study in `out` keeps one run."""
    return out / "runs" / f"{variant}-lr{lr:g}-seed{seed}"


def _line(record: Record) -> str:
    return (
        f"{record['variant']}  {record['role']}  lr {record['lr']:g}  seed {record['seed']}  "
        f"val loss {val_loss(record):.4f}  {record['primary']} {primary(record):.4f}  "
        f"{record['seconds']:.1f} s"
    )


def first_rates(optimizer: str) -> tuple[float, ...]:
    """The rates that a sweep begins with; it goes on from there as far as it must."""
    return GRIDS.get(optimizer, DEFAULT_GRID)


def best_rate(losses: dict[float, float]) -> float:
    return min(losses, key=losses.__getitem__)


def further_rate(losses: dict[float, float]) -> float | None:
    """What a sweep tries next: beyond the best rate where that is at the edge of those tried, lower
    where all diverged (infinite losses); None: the best is known.
    """
    best, low, high = best_rate(losses), min(losses), max(losses)
    diverges = math.isinf(losses[best])  # everywhere
    if low < best < high and not diverges:
        return None
    return low / 2 if best == low or diverges else high * 2


def sweep(study: Study, variant: Variant, run: Callable[[list[Trial]], list[Record]]) -> float:
    """The rate of the lowest validation loss on the tuning seeds, with higher and lower ones tried.

    Where all runs diverge, lower rates are tried. Raises SweepError if the loss still falls at the
    edge of MAX_RATES rates, or all diverge.
    """
    losses: dict[float, float] = {}
    rates = list(first_rates(variant.optimizer))
    while len(losses) < MAX_RATES:
        for lr in rates:
            seeds = range(study.tuning_seeds)
            records = run([study.point(variant, "tuning", lr, seed) for seed in seeds])
            mean = statistics.mean(map(val_loss, records))  # NaN if one of them diverged
            losses[lr] = math.inf if math.isnan(mean) else mean
        further = further_rate(losses)
        if further is None:
            return best_rate(losses)
        rates = [further]
    raise SweepError(f"{variant.name}: no best learning rate inside {sorted(losses)}")


def compare(study: Study, workers: int) -> list[Record]:
    """Every record of the study's folder, also written to records.jsonl there.

    A variant whose sweep finds no rate has no fresh runs, and the others go on. Any other exception
    ends it all; what was finished until then is written all the same.
    """
    runner = Runner(str(study.out), workers, run_trial, _line)

    rates: dict[str, float] = {}

    def one(variant: Variant) -> None:
        with contextlib.suppress(
            SweepError
        ):  # its tuning runs tell: studies.report.summary_text.on_sweeps
            lr = rates[variant.name] = sweep(study, variant, runner.run)
            runner.run([study.point(variant, "fresh", lr, seed) for seed in study.seeds])

    try:
        with ThreadPoolExecutor(len(study.variants) + 1) as threads, runner:
            references = threads.submit(runner.run, study.references())
            jobs = [threads.submit(one, each) for each in study.variants]
            for finished in as_completed([*jobs, references]):
                finished.result()
            runner.run(study.controls(rates))
    finally:
        records = _unite(study.out / "records.jsonl", runner.records.values())
    return records


def _unite(path: Path, records: Collection[Record]) -> list[Record]:
    """Add records to a file, in the place of those of the same runs; returns all that it holds.

    Fresh runs replace all fresh runs of the same variant at another rate: a sweep has one best.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    rates = {row["variant"]: row["lr"] for row in records if row["role"] == "fresh"}
    there = [row for row in map(json.loads, lines) if not _is_stale(row, rates)]
    rows = [*there, *map(without_curves, records)]
    united = {(row["variant"], row["lr"], row["seed"]): row for row in rows}
    records = [united[key] for key in sorted(united)]
    write_records(path, records)
    return records


def _is_stale(row: Record, rates: dict[str, float]) -> bool:
    return row["role"] == "fresh" and row["lr"] != rates.get(row["variant"], row["lr"])


def without_curves(record: Record) -> Record:
    """What is not reported keeps its numbers, not its curves and samples (they are in runs/)."""
    if record["role"] not in ("tuning", "control") or record["grade"] is None:
        return record
    return record | {"grade": record["grade"] | {"curves": {}, "n_t": {}, "samples": []}}
