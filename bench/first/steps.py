"""Time the steps of GPT-2 124M with and without DoPr, in four minutes.

    python -m bench.first.steps [--seconds 220] [--rounds 3] [--out FILE] [--tiny]

Muon and AdamW train alone and with DoPr, in the modes of bench.step_overhead that CONTENDERS names.
The contenders take turns, and each turn adds a row with the milliseconds of a step and the peak
memory of the contender. Before its first turn, a contender is compiled in steps of one micro-batch;
all are in one process, so that both optimizers share the compiled code. After the first round, no
round starts that would end after --seconds. A second call keeps the rows in FILE that the same
sources measured on such a machine; it times the contenders without a row, and their bases again.
--compile_only NAME times nothing and leaves the compiled code in the caches of inductor and Triton.
Needs a GPU; --tiny runs anywhere.
"""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.arguments import bench_parser, require_gpu
from bench.first.attempt import attempt
from bench.results import earlier_rows
from bench.step_overhead import PRESETS, StepVariant, make_optimizers, modes
from bench.timing import DEVICE, facts, measure_all

BASE = "base"
CONTENDERS = {  # name: mode of bench.step_overhead; "recommended" has the settings of config/
    BASE: "base",
    "recommended": "sampled, fresh mean",
    "sampled": "sampled",
    "exact": "exact",
}
OPTIMIZERS = ("muon", "adamw")


class Turn(NamedTuple):
    """One measurement. Contenders are compared within a round of a call."""

    call: int
    round: int
    optimizer: str
    contender: str


class StepTimer:
    """Build the contenders when they are first needed, and time their turns."""

    def __init__(self, preset: str) -> None:
        self.preset = PRESETS[preset]
        (self.width,) = self.preset.widths
        self.settings = modes(self.preset, self.width, "cholesky")
        self.variants: dict[tuple[str, ...], StepVariant] = {}
        self.built_s = 0.0  # seconds spent in `build`

    def turns(self, rows: list[dict[str, Any]], *, rounds: int, seconds: float) -> Iterator[Turn]:
        """Yield the turns of one call after those in `rows`; none if no contender is missing."""
        call = 1 + max((row["call"] for row in rows), default=0)
        names = missing({(row["optimizer"], row["contender"]) for row in rows})
        if not names:
            return
        started = time.perf_counter()
        for number in range(rounds):
            elapsed = time.perf_counter() - started
            if number and elapsed + (elapsed - self.built_s) / number > seconds:
                return
            yield from (Turn(call, number, *name) for name in names)

    def build(self, optimizer: str, contender: str) -> StepVariant:
        """Return a compiled contender, which has made one round of steps of one micro-batch."""
        dopr = self.settings[CONTENDERS[contender]]
        make = partial(make_optimizers, optimizer=optimizer, dopr=dopr)
        variant = StepVariant(self.preset._replace(accumulation=1), self.width, make)
        shape = (self.preset.accumulation, -1, -1)
        variant.x, variant.y = variant.x.expand(shape), variant.y.expand(shape)
        return variant

    def measure(self, turn: Turn) -> dict[str, Any]:
        """Return the row of a turn. If the contender raises, `exception` says why."""
        return turn._asdict() | attempt(partial(self.time_round, turn.optimizer, turn.contender))

    def time_round(self, *key: str) -> dict[str, Any]:
        """Time a round of a contender. `build_s` is not 0 if it had to be built first."""
        started = time.perf_counter()
        if key not in self.variants:
            self.variants[key] = self.build(*key)
        build_s = time.perf_counter() - started
        self.built_s += build_s
        variant = self.variants[key]
        ms, peak = variant.measured_round()
        row = {"tokens": variant.x.numel(), "step_ms": ms, "MiB": peak / 2**20}
        return row | {"build_s": build_s}


def missing(done: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return (optimizer, contender) of what to measure: each base before those without a row."""
    names = []
    for optimizer in OPTIMIZERS:
        found = [name for name in CONTENDERS if name != BASE and (optimizer, name) not in done]
        names += [(optimizer, name) for name in (BASE, *found) if found]
    return names


def describe(row: dict[str, Any]) -> str:
    name = f"round {row['round']} {row['optimizer']} {row['contender']:12}"
    if "exception" in row:
        return f"{name} FAILED  {row['exception']}"
    return f"{name} {row['step_ms']:.1f} ms  {row['MiB']:.0f} MiB  built in {row['build_s']:.0f} s"


def measure_turns(timer: StepTimer, out: Path | None, *, rounds: int, seconds: float) -> None:
    """Measure the turns that are missing in the file `out`, and add them to it."""
    rows = earlier_rows(out, facts(DEVICE))
    turns = timer.turns(rows, rounds=rounds, seconds=seconds)
    measure_all(turns, timer.measure, describe, out, rows)


def main() -> None:
    parser = bench_parser("first.steps", __doc__, rounds=3)
    parser.add_argument("--seconds", type=float, default=220, help="default: 220")
    parser.add_argument("--compile_only", choices=CONTENDERS, help="fill the caches only")
    parser.add_argument("--tiny", action="store_true", help="train a tiny model on any machine")
    arguments = parser.parse_args()
    require_gpu(parser, arguments.tiny or DEVICE.type == "cuda")
    timer = StepTimer("tiny" if arguments.tiny else "gpt2")
    if arguments.compile_only:
        timer.build(OPTIMIZERS[0], arguments.compile_only)
    else:
        measure_turns(timer, arguments.out, rounds=arguments.rounds, seconds=arguments.seconds)


if __name__ == "__main__":
    main()
