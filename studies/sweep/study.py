"""Run a study: sweep the learning rate of each optimizer, then run fresh seeds at the best rate.

The learning rate is swept on tuning seeds over a factor-2 grid, which grows while the best rate is
at its edge; the best rate has the lowest *validation* loss. Fresh seeds, which were not used for
tuning, run at that rate; only they are reported. Runs share a pool of processes.
"""

import contextlib
import json
import math
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.files import write_atomic
from studies.stats.errors import primary
from studies.stats.records import (
    RECORDS,
    Record,
    StudyProtocol,
    read_object,
    read_records,
    val_loss,
)
from studies.sweep.reference import ReferenceTrial
from studies.sweep.results import unite
from studies.sweep.runner import Runner
from studies.sweep.tasks import trial_type
from studies.sweep.trial import Trial, run_folder, run_trial
from studies.sweep.variants import Variant

FRESH = 200  # the first fresh seed; tuning seeds are 0, 1, ...
MAX_RATES = 16  # the most rates of a sweep
AUX_LR = 4e-3  # of the AdamW beside matrix optimizers, with and without DoPr


class SweepError(ValueError):
    """A sweep found no best learning rate. This is a result, which concerns one variant only."""


@dataclass(frozen=True)
class Study:
    """The optimizers to compare, the task, and the folder of the results."""

    out: Path
    task: Any  # TaskBase
    variants: tuple[Variant, ...]
    steps: int
    tuning_seeds: int
    fresh_seeds: int
    n: int  # graded episodes of each run
    settings: dict[str, Any]  # of train.py, for all variants

    @property
    def seeds(self) -> range:
        """The fresh seeds, which are reported."""
        return range(FRESH, FRESH + self.fresh_seeds)

    def trial(
        self, variant: Variant, role: str, lr: float, seed: int, kind: type[Trial] | None = None
    ) -> Trial:
        """Return one run. The seed also selects the instance of the task, if the task has any.

        kind: defaults to the kind that trains models for the task.
        """
        kind = kind or trial_type(self.task)
        is_set = "aux_lr" in self.settings or not kind.has_aux_lr
        aux = {"aux_lr": AUX_LR} if not is_set and variant.has_aux else {}
        return kind(
            folder=run_folder(self.out, variant.name, lr, seed),
            task=replace(self.task, instance=seed) if self.task.has_instances else self.task,
            variant=variant.name,
            base=variant.base,
            role=role,
            lr=lr,
            seed=seed,
            settings={"max_steps": self.steps} | self.settings | aux | dict(variant.settings),
            n=self.n,
        )

    def first_rates(self, variant: Variant) -> tuple[float, ...]:
        """Return the rates that the sweep of a variant begins with."""
        return trial_type(self.task).first_rates(variant.optimizer)

    def references(self) -> list[Trial]:
        """Return the task's references on the instances of the fresh seeds.

        A task without instances has one run of each: no seed would change it.
        """
        seeds = self.seeds if self.task.has_instances else self.seeds[:1]
        return [
            self.trial(Variant(name, name, ()), "reference", 0.0, seed, ReferenceTrial)
            for name in self.task.references
            for seed in seeds
        ]

    def controls(self, rates: dict[str, float]) -> list[Trial]:
        """Return each base on the fresh seeds at the rates of its variants.

        They show which part of a gain the learning rate causes.

        rates: the best rate of every variant that has one. A variant whose base is not among them
            has no control.
        """
        tuned = [variant for variant in self.variants if variant.name in rates]
        bases = {variant.name: variant for variant in tuned if variant.name == variant.base}
        pairs = {(each.base, rates[each.name]) for each in tuned if each.base in bases}
        pairs -= {(name, rates[name]) for name in bases}
        return [
            self.trial(bases[name], "control", lr, seed)
            for name, lr in sorted(pairs)
            for seed in self.seeds
        ]

    def fixed(self) -> dict[str, Any]:
        """Return the settings that must be the same in all commands on one folder."""
        numbers = {key: getattr(self, key) for key in ("steps", "tuning_seeds", "n", "settings")}
        return {"task": self.task.name, "spec": self.task.spec} | numbers

    def begin(self, command: str) -> None:
        """Write protocol.json, or add this command's variants and seeds to the existing one.

        Raises ValueError if the existing protocol is damaged or has other fixed settings, or a
        variant of the same name with other settings.
        """
        path = self.out / "protocol.json"
        fixed = json.loads(json.dumps(self.fixed()))
        variants = {variant.name: dict(variant.settings) for variant in self.variants}
        found = {**fixed, "variants": {}, "fresh_seeds": [], "command": ""}
        if path.exists():
            found = read_object(path, StudyProtocol, "use another --out")
        existing = found["variants"]
        changed = [key for key in fixed if found.get(key) != fixed[key]]
        changed += [
            each for each in variants if existing.get(each, variants[each]) != variants[each]
        ]
        if changed:
            raise ValueError(
                f"--out={self.out} holds a study with another {', '.join(changed)}; "
                "use another --out"
            )
        protocol = fixed | {
            "variants": existing | variants,
            "fresh_seeds": sorted({*found["fresh_seeds"], *self.seeds}),
            "select": "val_loss",
            "command": "\n".join(dict.fromkeys([*found["command"].splitlines(), command])),
        }
        write_atomic(path, json.dumps(protocol, indent=1) + "\n")

    def check(self) -> None:
        """Raise ValueError if tuning seeds are among the fresh ones, or a variant cannot train."""
        if self.tuning_seeds > FRESH:
            raise ValueError(
                f"--tuning_seeds={self.tuning_seeds}: at most {FRESH}, where the fresh seeds begin"
            )
        for variant in self.variants:
            try:
                self.trial(variant, "tuning", self.first_rates(variant)[0], 0).asked()
            except ValueError as error:
                raise ValueError(f"{variant.name}: {error}") from error


def run_line(record: Record) -> str:
    """Describe a finished run in a line."""
    return (
        f"{record['variant']}  {record['role']}  lr {record['lr']:g}  seed {record['seed']}  "
        f"val loss {val_loss(record):.4f}  {record['primary']} {primary(record):.4f}  "
        f"{record['seconds']:.1f} s"
    )


def mean_loss(records: Iterable[Record]) -> float:
    """Return the mean validation loss of runs; infinite if one of them diverged."""
    mean = statistics.mean(map(val_loss, records))
    return math.inf if math.isnan(mean) else mean


def best_rate(losses: dict[float, float]) -> float:
    return min(losses, key=losses.__getitem__)


def further_rate(losses: dict[float, float]) -> float | None:
    """Return the rate that a sweep tries next; None if the best rate is known.

    That is a rate beyond the best one if that is at the edge of those tried, and a lower rate if
    every rate diverged (infinite losses).
    """
    best, low, high = best_rate(losses), min(losses), max(losses)
    all_diverged = math.isinf(losses[best])
    if low < best < high and not all_diverged:
        return None
    return low / 2 if best == low or all_diverged else high * 2


def search_rates(
    loss_of: Callable[[float], float], rates: Iterable[float], name: str
) -> dict[float, float]:
    """Return {rate: loss} in increasing order, with the best rate inside the grid.

    The grid grows while the best rate is at its edge, and downwards while every rate diverges.
    Raises SweepError, which begins with `name`, if MAX_RATES rates do not contain a best one.
    """
    losses = {lr: loss_of(lr) for lr in rates}
    while lr := further_rate(losses):
        if len(losses) >= MAX_RATES:
            raise SweepError(f"{name}: no best learning rate inside {sorted(losses)}")
        losses[lr] = loss_of(lr)
    return dict(sorted(losses.items()))


def sweep(study: Study, variant: Variant, run: Callable[[list[Trial]], list[Record]]) -> float:
    """Return the rate with the lowest validation loss on the tuning seeds; see `search_rates`."""

    def loss_of(lr: float) -> float:
        seeds = range(study.tuning_seeds)
        return mean_loss(run([study.trial(variant, "tuning", lr, seed) for seed in seeds]))

    return best_rate(search_rates(loss_of, study.first_rates(variant), variant.name))


def compare(study: Study, workers: int) -> list[Record]:
    """Run the study; write records.jsonl in its folder and return every record in it.

    A variant whose sweep finds no best rate has no fresh runs, and the others continue. Any other
    exception ends the study; the runs that have finished are written all the same. Raises
    AnalysisError, before any run, if records.jsonl is damaged.
    """
    read_records(study.out / RECORDS)  # raises AnalysisError before any run
    runner = Runner(str(study.out), workers, run_trial, run_line)
    rates: dict[str, float] = {}

    def run_variant(variant: Variant) -> None:
        with contextlib.suppress(SweepError):  # summary_text.on_sweeps reports its tuning runs
            lr = rates[variant.name] = sweep(study, variant, runner.run)
            runner.run([study.trial(variant, "fresh", lr, seed) for seed in study.seeds])

    try:
        with ThreadPoolExecutor(len(study.variants) + 1) as threads, runner:
            references = threads.submit(runner.run, study.references())
            jobs = [threads.submit(run_variant, variant) for variant in study.variants]
            for finished in as_completed([*jobs, references]):
                finished.result()
            runner.run(study.controls(rates))
    finally:
        records = unite(study.out / RECORDS, runner.records.values())
    return records
