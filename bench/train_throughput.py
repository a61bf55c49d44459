"""Compare the speed of our training loop with nanoGPT's, in tokens per second.

    python -m bench.train_throughput --nanogpt ../nanoGPT [--rounds 5] [--steps 300]
    python -m bench.train_throughput --nanogpt ../nanoGPT --preset gpt2 --rounds 3   # a CUDA GPU

Preset cpu is nanoGPT's CPU example: 4 layers, 4 heads, width 128, block size 64, batch size 12, in
fp32, on characters. Preset gpt2 is nanoGPT's GPT-2 124M, compiled, in bf16, with 0.5M tokens per
step, on random words with GPT-2's vocabulary size of 50,257, which nanoGPT pads to 50,304. Both
sides train without dropout and biases on the same ids. The two alternate, each through its own
command line and in its own process, and reports every step. The time of a run is the median of
these step times, including data loading. Without --nanogpt, only our side is measured.
"""

import json
import math
import os
import pickle
import random
import re
import shutil
import statistics
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.arguments import bench_parser, nanogpt_checkout
from bench.results import write_rows
from bench.timing import DEVICE, compared, facts
from data.dataset import open_dataset
from eval.command import leave_on_signals

ROOT = Path(__file__).resolve().parent.parent
NANOGPT_FILES = ("train.py", "model.py", "configurator.py")


def library_text() -> str:
    """Return 1.1 MB of ASCII text that every machine has: sources of the standard library."""
    library = Path(os.__file__).parent
    text = "".join(path.read_text(errors="ignore") for path in sorted(library.glob("*.py")))
    return text.encode("ascii", errors="ignore").decode()[:1_100_000]


def random_text(n_words: int) -> str:
    """Draw words from a tenth as many distinct words, so that a BPE finds enough merges."""
    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_lowercase, k=6)) for _ in range(n_words // 10)]
    return " ".join(draw.choices(words, k=n_words))


class ThroughputPreset(NamedTuple):
    """The data, model, batch and number of steps of both sides."""

    text: Callable[[], str]
    tokenizer: list[str]  # arguments of data.text.prepare
    shape: dict[str, int]
    batch_size: int  # sequences per step
    micro_batch_size: int
    steps: int
    untimed_steps: int  # at the beginning, whose times are left out
    pads_vocab: bool = False  # whether nanoGPT's vocabulary is padded to a multiple of 64
    compile_in_bf16: bool = False


def shape(n_layer: int, n_head: int, n_embd: int, block_size: int) -> dict[str, int]:
    return {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size}


def bpe(vocab_size: int) -> list[str]:
    return ["--tokenizer=bpe", f"--vocab_size={vocab_size}"]


PRESETS = {
    "cpu": ThroughputPreset(
        library_text,
        ["--tokenizer=char"],
        shape(4, 4, 128, 64),
        batch_size=12,
        micro_batch_size=12,
        steps=300,
        untimed_steps=20,
    ),
    "gpt2": ThroughputPreset(
        partial(random_text, 300_000),
        bpe(50_257),
        shape(12, 12, 768, 1024),
        batch_size=512,
        micro_batch_size=32,
        steps=30,
        untimed_steps=10,
        pads_vocab=True,
        compile_in_bf16=True,
    ),
    "tiny": ThroughputPreset(
        partial(random_text, 3_000),
        bpe(301),
        shape(1, 1, 8, 8),
        batch_size=4,
        micro_batch_size=2,
        steps=7,
        untimed_steps=4,
        pads_vocab=True,
    ),
}


def prepare(folder: Path, preset: ThroughputPreset) -> int:
    """Write the same ids in both trainers' formats. Return the vocabulary size."""
    text, source = preset.text(), folder / "corpus"
    source.mkdir()
    size = len(text) // 100
    for i in range(100):  # several documents, so that they can be split
        (source / f"{i}.txt").write_text(text[i * size : (i + 1) * size])
    command = ["data.text.prepare", f"--input={source}", *preset.tokenizer]
    command += ["--val_fraction=0.1", f"--out={folder / 'ours'}"]
    subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    dataset = open_dataset(folder / "ours")
    nanogpt_data = folder / "nanogpt" / "data" / "corpus"
    nanogpt_data.mkdir(parents=True)
    for split in ("train", "val"):
        tokens = [shard.tokens() for shard in dataset.split(split).shards]
        np.concatenate(tokens).tofile(nanogpt_data / f"{split}.bin")
    return dataset.tokenizer.n_vocab


def run_ours(
    folder: Path, preset: ThroughputPreset, round_number: int
) -> tuple[float, float | None]:
    """Return the median step time in ms, and its model FLOPs utilization (None if unknown)."""
    out = folder / f"out{round_number}"
    settings: dict[str, Any] = {**preset.shape, "batch_size": preset.batch_size}
    settings |= {"micro_batch_size": preset.micro_batch_size, "dataset": folder / "ours"}
    settings |= {"out_dir": out, "max_steps": preset.steps, "log_every": 1}
    settings |= {"warmup_steps": 1, "eval_every": preset.steps, "eval_batches": 1, "bias": "false"}
    settings |= {"device": DEVICE.type, "save_every": preset.steps}
    if preset.compile_in_bf16:
        settings |= {"compile": "true", "dtype": "bfloat16", "loader_workers": 1}
    run_train_py(settings, cwd=ROOT)
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    rows = [row for row in rows if row["kind"] == "train"][preset.untimed_steps :]
    middle = sorted(rows, key=lambda row: row["step_ms"])[len(rows) // 2]
    return middle["step_ms"], middle["mfu"]


def run_nanogpt(folder: Path, preset: ThroughputPreset, vocab_size: int) -> float:
    """Return the median step time in ms, from the times that nanoGPT prints."""
    settings: dict[str, Any] = {**preset.shape, "batch_size": preset.micro_batch_size}
    settings["gradient_accumulation_steps"] = preset.batch_size // preset.micro_batch_size
    settings |= {"dataset": "corpus", "device": DEVICE.type, "dropout": 0.0, "bias": False}
    settings |= {"max_iters": preset.steps, "lr_decay_iters": preset.steps, "warmup_iters": 1}
    settings |= {"log_interval": 1, "eval_iters": 1}
    settings |= {"eval_interval": 10 * preset.steps, "compile": preset.compile_in_bf16}
    settings["dtype"] = "bfloat16" if preset.compile_in_bf16 else "float32"
    multiple = 64 if preset.pads_vocab else 1
    with (folder / "nanogpt/data/corpus/meta.pkl").open("wb") as file:
        pickle.dump({"vocab_size": math.ceil(vocab_size / multiple) * multiple}, file)
    printed = run_train_py(settings, cwd=folder / "nanogpt")
    times = [float(ms) for ms in re.findall(r"time ([\d.]+)ms", printed)]
    return statistics.median_high(times[preset.untimed_steps :])


def run_train_py(settings: dict[str, Any], cwd: Path) -> str:
    """Run `python train.py` in `cwd` and return its standard output."""
    command = [sys.executable, "train.py", *(f"--{key}={value}" for key, value in settings.items())]
    return subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout


def summary(
    preset: ThroughputPreset, vocab_size: int, times: dict[str, list[float]], mfu: float | None
) -> dict[str, Any]:
    """Return the tokens per second of each side, their ratio, and our model FLOPs utilization."""
    tokens = preset.batch_size * preset.shape["block_size"]
    result = compared(times)
    speeds = {side: 1e3 * tokens / ms for side, ms in result["ms"].items()}
    row = {"tokens": tokens, "vocab_size": vocab_size, **preset.shape, "step_ms": times}
    row |= {"tokens_per_s": speeds, "mfu": mfu}
    if "nanogpt" in speeds:
        row["ratio"] = result["ratio"]["nanogpt"]  # nanoGPT's time over ours
    return row


def compare(
    preset: ThroughputPreset, nanogpt: Path | None, rounds: int, out: Path | None
) -> dict[str, Any]:
    """Run both sides alternately, write the row after every round, and return it."""
    times: dict[str, list[float]] = {"ours": []} | ({"nanogpt": []} if nanogpt else {})
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocab_size = prepare(folder, preset)
        if nanogpt:
            for file in NANOGPT_FILES:
                shutil.copy(nanogpt / file, folder / "nanogpt")
        for round_number in range(rounds):
            ms, mfu = run_ours(folder, preset, round_number)
            times["ours"].append(ms)
            if nanogpt:
                times["nanogpt"].append(run_nanogpt(folder, preset, vocab_size))
            print({side: f"{values[-1]:.2f} ms" for side, values in times.items()}, flush=True)
            row = summary(preset, vocab_size, times, mfu)
            write_rows(out, facts(DEVICE), [row])
    return row


def main() -> None:
    parser = bench_parser("train_throughput", __doc__, rounds=5)
    parser.add_argument("--nanogpt", type=nanogpt_checkout, help="a folder with nanoGPT's sources")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--steps", type=int, help="replace the preset's number of steps")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset]
    if arguments.steps is not None:
        preset = preset._replace(steps=arguments.steps)
    if preset.steps <= preset.untimed_steps:
        enough = preset.untimed_steps + 1
        parser.error(f"--steps {preset.steps}: only covers the warm-up; use at least {enough}")
    if preset.compile_in_bf16 and DEVICE.type != "cuda":
        parser.error(f"--preset {arguments.preset} needs a CUDA GPU; use --preset cpu")

    row = compare(preset, arguments.nanogpt, arguments.rounds, arguments.out)
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    leave_on_signals()  # removes the temporary folders on a signal
    main()
