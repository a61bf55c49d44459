"""A study: what is compared on what, its sweeps and fresh runs, on a pool of processes.

The learning rate of each optimizer is swept on tuning seeds over a factor-2 grid, which grows while
the best rate is at its edge; the best has the lowest *validation* loss. Fresh seeds, on which
nothing was tuned, run at that rate; they alone are reported.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from checkpoint import write_atomic
from eval.analysis import Record, primary, val_loss
from eval.lds import Lds
from eval.points import Point, PointError, one_thread, run_point
from eval.tasks import Task
from eval.variants import Variant

FRESH = 100  # the first fresh seed; tuning seeds are 0, 1, ...
GRIDS = {  # the first learning rates
    "adamw": (2e-3, 4e-3, 8e-3),
    "sgd": (0.1, 0.2, 0.4),
    "signum": (5e-4, 1e-3, 2e-3),
    "muon": (8e-3, 1.6e-2, 3.2e-2),
    "adamuon": (8e-3, 1.6e-2, 3.2e-2),
}
MAX_RATES = 16  # of a sweep: a loss that falls all the way is no sweep
AUX_LR = 4e-3  # of the AdamW beside muon and adamuon, with and without DoPr


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

    def point(self, variant: Variant, role: str, lr: float, seed: int) -> Point:
        """One run. A seed is also the task's instance, if the task has any."""
        has_instances = any(field.name == "instance" for field in fields(self.task))
        has_aux = variant.optimizer in ("muon", "adamuon") and "aux_lr" not in self.settings
        aux = {"aux_lr": AUX_LR} if has_aux and isinstance(self.task, Task) else {}
        return Point(
            folder=self.out / "runs" / f"{variant.name}-lr{lr:g}-seed{seed}",
            task=replace(self.task, instance=seed) if has_instances else self.task,
            variant=variant.name,
            base=variant.base,
            role=role,
            lr=lr,
            seed=seed,
            settings={"max_steps": self.steps} | self.settings | aux | dict(variant.settings),
            n=self.n,
        )

    def fixed(self) -> dict[str, Any]:
        """What must not change between two commands on the same folder."""
        numbers = {key: getattr(self, key) for key in ("steps", "tuning_seeds", "n", "settings")}
        return {"task": self.task.name, "spec": self.task.spec} | numbers

    def begin(self, command: str) -> None:
        """Write protocol.json. ValueError if the folder holds a study with other fixed settings."""
        path = self.out / "protocol.json"
        fixed = json.loads(json.dumps(self.fixed()))
        if path.exists():
            found = json.loads(path.read_text())
            changed = [key for key in fixed if found.get(key) != fixed[key]]
            if changed:
                raise ValueError(
                    f"--out={self.out} holds a study with another {', '.join(changed)}; use another"
                )
        self.out.mkdir(parents=True, exist_ok=True)
        protocol = fixed | {
            "variants": {variant.name: dict(variant.settings) for variant in self.variants},
            "fresh_seeds": list(range(FRESH, FRESH + self.fresh_seeds)),
            "select": "val_loss",
            "command": command,
        }
        write_atomic(path, json.dumps(protocol, indent=1) + "\n")


class Runner:
    """Runs points side by side; keeps their records as they come."""

    def __init__(self, name: str, workers: int) -> None:
        self.records: dict[Path, Record] = {}
        self._pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=one_thread)
        self._bar = tqdm(desc=name, unit="run", disable=not sys.stderr.isatty())

    def run(self, points: Sequence[Point]) -> list[Record]:
        """The records of these points, in order; those of points that ran before are read."""
        futures = [self._pool.submit(run_point, point) for point in points]
        return [
            self._keep(point, future.result())
            for point, future in zip(points, futures, strict=True)
        ]

    def _keep(self, point: Point, record: Record) -> Record:
        if point.folder not in self.records:
            self._bar.update()
            tqdm.write(_line(record), file=sys.stdout)
        self.records[point.folder] = record
        return record

    def close(self) -> None:
        self._bar.close()
        self._pool.shutdown(cancel_futures=True)


def _line(record: Record) -> str:
    return (
        f"{record['variant']}  {record['role']}  lr {record['lr']:g}  seed {record['seed']}  "
        f"val loss {val_loss(record):.4f}  {record['primary']} {primary(record):.4f}  "
        f"{record['seconds']:.1f} s"
    )


def sweep(study: Study, variant: Variant, run: Callable[[list[Point]], list[Record]]) -> float:
    """The rate of the lowest validation loss on the tuning seeds, with higher and lower ones tried.

    Raises PointError if the loss still falls at the edge of MAX_RATES rates.
    """
    losses: dict[float, float] = {}
    rates = list(GRIDS[variant.optimizer])
    while len(losses) < MAX_RATES:
        for lr in rates:
            seeds = range(study.tuning_seeds)
            records = run([study.point(variant, "tuning", lr, seed) for seed in seeds])
            mean = statistics.mean(map(val_loss, records))  # NaN if one of them diverged
            losses[lr] = math.inf if math.isnan(mean) else mean
        best, low, high = min(losses, key=losses.__getitem__), min(losses), max(losses)
        if low < best < high:
            return best
        rates = [low / 2] if best == low else [high * 2]
    raise PointError(f"{variant.name}: no best learning rate inside {sorted(losses)}")


def compare(study: Study, workers: int) -> list[Record]:
    """Every record of the study, also written to records.jsonl in its folder."""
    runner = Runner(str(study.out), workers)

    def one(variant: Variant) -> None:
        lr = sweep(study, variant, runner.run)
        seeds = range(FRESH, FRESH + study.fresh_seeds)
        runner.run([study.point(variant, "fresh", lr, seed) for seed in seeds])

    try:
        with ThreadPoolExecutor(len(study.variants)) as threads:
            list(threads.map(one, study.variants))
    finally:
        runner.close()
    records = [_lean(runner.records[folder]) for folder in sorted(runner.records)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_atomic(study.out / "records.jsonl", text)
    return records


def _lean(record: Record) -> Record:
    """Tuning runs keep their numbers, not their curves and samples (they are in runs/)."""
    if record["role"] != "tuning" or record["grade"] is None:
        return record
    return record | {"grade": record["grade"] | {"curves": {}, "n_t": {}, "samples": []}}
