"""Synthetic studies on disk for the tests of the report, in the format of studies.sweep.compare."""

import json
from pathlib import Path
from typing import Any

from tests.studies.records import record

HORIZON = 4
SEEDS = (100, 101, 102)


def graded(variant: str, seed: int, value: float | None, **changes: Any) -> dict[str, Any]:
    """A whole record: its B curve ends at `value`, its A curve at half of it. None: diverged."""
    run = record(variant, seed, value) | {
        "command": f"python train.py --seed={seed}",
        "environment": {"torch": "2.13.0", "git": "abc1234"},
        "seconds": 1.5,
        "settings": {"out_dir": f"out/{variant}"},
        "grading": {"n": 8, "seed": 0},
        **changes,
    }
    if value is None:
        return run
    ends = {"A": value / 2, "B": value, "G": value / 8}
    curves = {name: dict.fromkeys(("mean", "lo", "hi"), _line(end)) for name, end in ends.items()}
    run["grade"]["metrics"] |= {"val_kl": {"mean": run["val_loss"], "lo": 0.05, "hi": 0.15, "n": 8}}
    more = {"curves": curves, "n_t": {"data": [8] * HORIZON, "own": [8, 8, 6, 4]}}
    return run | {"grade": run["grade"] | more | {"samples": [{"data": "0 1", "own": "0 2"}]}}


def _line(end: float) -> tuple[float, ...]:  # (HORIZON,)
    return tuple(end * (t + 1) / HORIZON for t in range(HORIZON))


def fresh(variant: str, values: list[float | None], **changes: Any) -> list[dict[str, Any]]:
    """One fresh run a value, on SEEDS; validation loss is a tenth of the value."""
    return [
        graded(variant, seed, value, val_loss=None if value is None else value / 10, **changes)
        for seed, value in zip(SEEDS, values, strict=True)
    ]


def tuning(variant: str, losses: dict[float, float | None]) -> list[dict[str, Any]]:
    """Tuning runs on seed 0: learning rate -> validation loss."""
    return [
        graded(variant, 0, loss and 10 * loss, role="tuning", lr=lr, val_loss=loss)
        for lr, loss in losses.items()
    ]


def study() -> list[dict[str, Any]]:
    """DoPr clearly helps adamw, nobody knows about muon, and one fast run diverged."""
    return [
        *fresh("adamw", [5.0, 6.0, 7.0]),
        *fresh("dopr-adamw", [3.0, 4.1, 5.0]),
        *fresh("fast-dopr-adamw", [5.0, None, 6.5]),
        *fresh("muon", [4.0, 5.0, 6.0]),
        *fresh("dopr-muon", [4.5, 4.0, 6.2]),
        *tuning("adamw", {0.005: 0.6, 0.01: 0.5, 0.02: 0.7}),
        *tuning("dopr-adamw", {0.005: 0.5, 0.01: 0.4, 0.02: None}),
    ]


def write_study(folder: Path, records: list[dict[str, Any]], **changes: Any) -> Path:
    """A study's folder, as studies.sweep.compare leaves it."""
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(each) + "\n" for each in records)
    (folder / "records.jsonl").write_text(lines, encoding="utf-8")
    first = records[0]
    protocol = {key: first[key] for key in ("task", "spec", "steps")} | {
        "variants": {each["variant"]: {} for each in records},
        "fresh_seeds": list(SEEDS),
        "command": "python -m studies.sweep.compare --task pdfa",
        **changes,
    }
    (folder / "protocol.json").write_text(json.dumps(protocol), encoding="utf-8")
    return folder


def write_run(folder: Path, record: dict[str, Any]) -> Path:
    """A run's folder, as eval.rollout.ttf leaves it."""
    (folder / "ttf").mkdir(parents=True)
    path = folder / "ttf" / f"step-{record['steps']:08d}.json"
    path.write_text(json.dumps(record | {"role": "single"}), encoding="utf-8")
    return folder


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a study's folder."""
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
