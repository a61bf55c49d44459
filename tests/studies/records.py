"""Make records of studies, and write studies to disk as studies.sweep.compare does."""

import json
from pathlib import Path
from typing import Any

HORIZON = 4
SEEDS = (100, 101, 102)


def record(variant: str, seed: int, value: float | None, **changes: Any) -> dict[str, Any]:
    """Return a graded run whose primary metric is `value`; a run with None diverged."""
    estimate = {"mean": value, "lo": 0.0, "hi": 9.0, "n": 8}
    curve = {"mean": [1.0, value], "lo": [0.0, 0.0], "hi": [2.0, 9.0]}
    grade = {"metrics": {"accumulated_kl": estimate}, "curves": {"B": curve}, "n_t": {}}
    fields = {
        "task": "pdfa",
        "spec": "task:pdfa",
        "primary": "accumulated_kl",
        "higher_is_better": False,
        "variant": variant,
        "base": variant.removeprefix("fast-").removeprefix("dopr-"),
        "role": "fresh",
        "lr": 0.01,
        "seed": seed,
        "steps": 500,
        "tokens": 512000,
        "val_loss": None if value is None else 1.0,
        "grade": None if value is None else grade | {"samples": []},
        "command": f"python train.py --seed={seed}",
        "environment": {"torch": "2.13.0", "git": "abc1234"},
        "seconds": 1.5,
        "settings": {"out_dir": f"out/{variant}"},
    }
    return fields | changes


def graded(variant: str, seed: int, value: float | None, **changes: Any) -> dict[str, Any]:
    """Return a record whose curve B ends at `value` and whose curve A ends at half of it."""
    run = record(variant, seed, value, grading={"n": 8, "seed": 0}, **changes)
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
    """Return fresh runs on SEEDS. Their validation losses are a tenth of the values."""
    return [
        graded(variant, seed, value, val_loss=None if value is None else value / 10, **changes)
        for seed, value in zip(SEEDS, values, strict=True)
    ]


def tuning(variant: str, losses: dict[float, float | None]) -> list[dict[str, Any]]:
    """Return tuning runs on seed 0 from {learning rate: validation loss}."""
    return [
        graded(variant, 0, loss and 10 * loss, role="tuning", lr=lr, val_loss=loss)
        for lr, loss in losses.items()
    ]


def study() -> list[dict[str, Any]]:
    """Return a study: DoPr clearly helps adamw, muon is unclear, and one fast run diverged."""
    return [
        *fresh("adamw", [5.0, 6.0, 7.0]),
        *fresh("dopr-adamw", [3.0, 4.1, 5.0]),
        *fresh("fast-dopr-adamw", [5.0, None, 6.5]),
        *fresh("muon", [4.0, 5.0, 6.0]),
        *fresh("dopr-muon", [4.5, 4.0, 6.2]),
        *tuning("adamw", {0.005: 0.6, 0.01: 0.5, 0.02: 0.7}),
        *tuning("dopr-adamw", {0.005: 0.5, 0.01: 0.4, 0.02: None}),
    ]


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in records))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_study(folder: Path, records: list[dict[str, Any]], **changes: Any) -> Path:
    """Write a study's folder; `changes` apply to its protocol."""
    folder.mkdir(parents=True)
    write_lines(folder / "records.jsonl", records)
    protocol = {key: records[0][key] for key in ("task", "spec", "steps")} | {
        "variants": {each["variant"]: {} for each in records},
        "fresh_seeds": list(SEEDS),
        "command": "python -m studies.sweep.compare --task pdfa",
        **changes,
    }
    (folder / "protocol.json").write_text(json.dumps(protocol))
    return folder


def write_run(folder: Path, record: dict[str, Any]) -> Path:
    """Write a run's folder as eval.rollout.ttf does."""
    (folder / "ttf").mkdir(parents=True)
    write_lines(folder / f"ttf/step-{record['steps']:08d}.json", [record | {"role": "single"}])
    return folder
