"""Time alternatives in turns, so that a drift of the machine's speed affects all of them alike."""

import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from data.files import write_atomic
from trainer.metrics import environment

Work = Callable[[], Any]
Case = TypeVar("Case")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIN_MS = 2.0  # Shorter work is repeated within one measurement, to hide the launch overhead.


def milliseconds(work: Work, device: torch.device, repeats: int = 1) -> float:
    """Return the mean time of `repeats` calls. On a GPU, CUDA events measure it."""
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
    """Return the milliseconds of every contender in every round.

    After three rounds, no new round starts once `seconds` have passed. Call each contender once
    before, because its first call may compile.
    """
    repeats = dict.fromkeys(contenders, 1)
    if device.type == "cuda":
        warm = {name: milliseconds(work, device) for name, work in contenders.items()}
        repeats = {name: max(1, math.ceil(MIN_MS / max(ms, 0.02))) for name, ms in warm.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    started = time.perf_counter()
    for n_done in range(rounds):
        if n_done >= 3 and time.perf_counter() - started > seconds:
            break
        for name, work in contenders.items():
            times[name].append(milliseconds(work, device, repeats[name]))
    return times


def compared(times: dict[str, list[float]]) -> dict[str, Any]:
    """Summarize times: medians, and the median over rounds of the ratio to the first contender."""
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
    """Extend `trainer.metrics.environment` by the versions of the GPU driver, CUDA and Triton."""
    result = environment(device)
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        drivers = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
        result |= {"driver": drivers[0], "cuda": torch.version.cuda}
    try:
        import triton.knobs
    except ImportError:
        return result | {"triton": None}
    interpreted = " interpreted" if triton.knobs.runtime.interpret else ""
    return result | {"triton": triton.__version__ + interpreted}


def measure_all(
    cases: Iterable[Case],
    measure: Callable[[Case], dict[str, Any]],
    describe: Callable[[dict[str, Any]], str],
    out: Path | None,
) -> list[dict[str, Any]]:
    """Measure case after case. Print every row, and write all rows so far to `out`, at once."""
    environment, rows = facts(DEVICE), []
    for case in cases:
        rows.append(measure(case))
        print(describe(rows[-1]), flush=True)
        write_rows(out, environment, rows)
    return rows


def write_rows(path: Path | None, environment: dict[str, Any], rows: list[Any]) -> None:
    """Write the rows and their environment as JSON. Do nothing without a path."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"environment": environment, "rows": rows}, indent=2) + "\n")
