"""Timing that is fair: contenders take turns, so that a machine that drifts drifts for all."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.read import write_atomic
from trainer.metrics import environment

Work = Callable[[], Any]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LEAST_MS = 2.0  # of one measurement: shorter work is repeated, or its launch would be measured


def milliseconds(work: Work, device: torch.device, repeats: int = 1) -> float:
    """How long one of `repeats` calls takes; on a GPU by its own clock."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        return 1e3 * (time.perf_counter() - started) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def interleaved(
    contenders: Mapping[str, Work], device: torch.device, *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of every contender in every round, at least three rounds, then `seconds`.

    Call each contender once before: the first call may compile.
    """
    repeats = dict.fromkeys(contenders, 1)
    if device.type == "cuda":
        warm = {name: milliseconds(work, device) for name, work in contenders.items()}
        repeats = {name: max(1, math.ceil(LEAST_MS / max(ms, 0.02))) for name, ms in warm.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    started = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - started > seconds:
            break
        for name, work in contenders.items():
            times[name].append(milliseconds(work, device, repeats[name]))
    return times


def compared(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the median over rounds of each contender's time over the first one's."""
    first = next(iter(times.values()))
    return {
        "ms": {name: statistics.median(values) for name, values in times.items()},
        "ratio": {
            name: statistics.median(a / b for a, b in zip(values, first, strict=True))
            for name, values in times.items()
        },
        "rounds": len(first),
    }


def facts(device: torch.device) -> dict[str, Any]:
    """`runlog.environment`, and what matters on a GPU: driver, CUDA, triton."""
    found = environment(device)
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        drivers = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
        found |= {"driver": drivers[0], "cuda": torch.version.cuda}
    try:
        import triton.knobs
    except ImportError:
        return found | {"triton": None}
    interpreted = " interpreted" if triton.knobs.runtime.interpret else ""
    return found | {"triton": triton.__version__ + interpreted}


def write_rows(path: Path | None, environment: dict[str, Any], rows: list[Any]) -> None:
    """What was measured so far, as JSON; nothing without a path."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"environment": environment, "rows": rows}, indent=2) + "\n")
