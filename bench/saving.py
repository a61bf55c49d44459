"""Time the steps of runs that save in the background, in turns with runs that save in place.

    python -m bench.saving [--rounds 3] [--sizes 30m,124m] [--out FILE]

A run trains GPT-2 with AdamW for 12 steps and saves after steps 4 and 8 (and before the first and
after the last one, which is not counted). For every counted save this reports two times, as
multiples of a step without a save (the median of those of the run that saves in place):

    pause   how long the training stands still
    total   how much longer than four such steps the next four take, with the pause, because they
            share the CPU and the disk with the write
"""

import json
import shutil
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from bench.arguments import bench_parser
from bench.results import write_rows
from bench.timing import DEVICE, facts
from bench.train_throughput import PRESETS, prepare, shape
from eval.command import leave_on_signals

SIZES = {
    "tiny": shape(1, 1, 8, 8) | {"batch_size": 4},
    "30m": shape(6, 6, 384, 256) | {"batch_size": 2},
    "124m": shape(12, 12, 768, 256) | {"batch_size": 1},
}
STEPS, SAVE_EVERY = 12, 4
SAVES = range(SAVE_EVERY, STEPS, SAVE_EVERY)  # steps after which a counted checkpoint is saved


class RunTimes(NamedTuple):
    """The seconds of every step, with the save before it, and of this save, 0 if there is none."""

    steps: list[float]
    pauses: list[float]


def times_of_run(data: Path, out: Path, size: str, *, async_save: bool) -> RunTimes:
    """Train, and return the times."""
    import train
    from trainer.checkpoint.state import TrainState
    from trainer.saving import CheckpointSaver

    settings: dict[str, Any] = SIZES[size] | {"micro_batch_size": SIZES[size]["batch_size"]}
    settings |= {"dataset": data, "out_dir": out, "async_save": async_save, "device": DEVICE.type}
    settings |= {"max_steps": STEPS, "save_every": SAVE_EVERY, "keep_checkpoints": 1}
    settings |= {"warmup_steps": 1, "eval_every": STEPS, "eval_batches": 1, "log_every": 1}
    count_step, save = TrainState.count_step, CheckpointSaver.save
    ends, pauses = [time.perf_counter()], [0.0] * (STEPS + 1)

    def timed_step(self: TrainState, is_finite: bool) -> None:
        count_step(self, is_finite)
        ends.append(time.perf_counter())

    def timed_save(self: CheckpointSaver, *, is_last: bool) -> None:
        started = time.perf_counter()
        save(self, is_last=is_last)
        pauses[len(ends) - 1] = time.perf_counter() - started

    TrainState.count_step, CheckpointSaver.save = timed_step, timed_save
    try:
        with out.with_suffix(".log").open("w") as log, redirect_stdout(log):
            code = train.run([f"--{key}={value}" for key, value in settings.items()])
    finally:
        TrainState.count_step, CheckpointSaver.save = count_step, save
    if code:  # a signal stopped the run
        raise SystemExit(code)
    return RunTimes([end - start for start, end in pairwise(ends)], pauses)


def one_round(folder: Path, size: str, i: int) -> dict[str, Any]:
    """Train in both ways, each of which is the first in every other round."""
    times = {}
    for async_save in (bool(i % 2), not i % 2):
        out = folder / f"{size}_{i}_{async_save}"
        times[async_save] = times_of_run(folder / "ours", out, size, async_save=async_save)
        shutil.rmtree(out)
    row = costs(times[False], times[True])
    print(json.dumps({"size": size, **row}), flush=True)
    return row


def costs(in_place: RunTimes, in_background: RunTimes) -> dict[str, Any]:
    """Return the costs of the saves of one round, in steps without a save."""
    step = statistics.median(in_place.steps[i] for i in range(2, STEPS) if i not in SAVES)
    row: dict[str, Any] = {"step_s": step}
    for name, times in {"in place": in_place, "in background": in_background}.items():
        windows = [times.steps[i : i + SAVE_EVERY] for i in SAVES]
        row[f"pause {name}"] = [times.pauses[i] / step for i in SAVES]
        row[f"total {name}"] = [sum(window) / step - SAVE_EVERY for window in windows]
    return row


def summary(size: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians over rounds, and the rounds."""
    row: dict[str, Any] = {"size": size, "step_s": statistics.median(r["step_s"] for r in rounds)}
    for key in rounds[0].keys() - {"step_s"}:
        row[key] = statistics.median(cost for each in rounds for cost in each[key])
    return row | {"rounds": rounds}


def main(argv: list[str] | None = None) -> None:
    parser = bench_parser("saving", __doc__, rounds=3)
    parser.add_argument("--sizes", default="30m,124m", help=f"of {', '.join(SIZES)}")
    arguments = parser.parse_args(argv)
    sizes, rows = arguments.sizes.split(","), []
    if unknown := {*sizes} - {*SIZES}:
        parser.error(f"--sizes: unknown {', '.join(unknown)}; choose from {', '.join(SIZES)}")
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), PRESETS["tiny" if sizes == ["tiny"] else "gpt2"])
        for size in sizes:
            rounds = [one_round(Path(name), size, i) for i in range(arguments.rounds)]
            rows.append(summary(size, rounds))
            write_rows(arguments.out, facts(DEVICE), rows)
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    leave_on_signals()  # removes the temporary folders on a signal
    main()
