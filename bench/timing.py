"""Time alternatives in turns, so that a drift of the machine's speed affects all of them alike."""

import hashlib
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.results import write_rows
from trainer.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("bench", "config", "data", "eval", "kernels", "optim", "trainer", "model.py", "train.py")
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
    """Describe where a result comes from: the device, the versions and the sources.

    Needs no package besides torch. The digest `source` changes with every source file that a
    benchmark may run; the git revision also changes with other files, and may be unknown.
    """
    result = provenance(device) | {"triton": _triton_version(), "source": source_digest()}
    if device.type == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        result |= {"driver": driver.split()[0], "cuda": torch.version.cuda}
    return result


def source_digest() -> str:
    """Return a short digest of the names and contents of all Python files in SOURCES."""
    digest = hashlib.sha256()
    for part in (ROOT / name for name in SOURCES):
        for path in sorted(part.rglob("*.py")) if part.is_dir() else [part]:
            digest.update(f"{path.relative_to(ROOT)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _output(*command: str) -> str:
    """Return what a command prints, or "unknown" if it is missing, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _triton_version() -> str | None:
    try:
        import triton.knobs
    except ImportError:
        return None
    return triton.__version__ + (" interpreted" if triton.knobs.runtime.interpret else "")


def measure_all(
    cases: Iterable[Case],
    measure: Callable[[Case], dict[str, Any]],
    describe: Callable[[dict[str, Any]], str],
    out: Path | None,
    rows: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Measure case after case. Print every row, and write all rows so far to `out`, at once.

    The result begins with `rows`, which an earlier call measured.
    """
    facts_here, rows = facts(DEVICE), list(rows)
    for case in cases:
        rows.append(measure(case))
        print(describe(rows[-1]), flush=True)
        write_rows(out, facts_here, rows)
    return rows
