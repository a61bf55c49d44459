"""Does our training loop cost more than nanoGPT's? Tokens per second of both, run alternately.

    python -m bench.train_throughput --nanogpt ../nanoGPT [--rounds 5] [--steps 300]
    python -m bench.train_throughput --nanogpt ../nanoGPT --preset gpt2 --rounds 3   # a CUDA GPU

The cpu preset is nanoGPT's CPU example: 4 layers, 4 heads, 128 wide, block 64, batch 12, fp32, on
characters. gpt2 is its GPT-2 124M, compiled, in bf16, 0.5M tokens a step, on random words, with a
vocabulary of GPT-2's size: 50,257, which nanoGPT pads to 50,304. Both sides have no dropout and no
biases, get the same ids, and run through their own command lines in processes of their own. A run's
figure is the median of the step times that it reports, data loading included. Without --nanogpt
only our side is measured.
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

from bench.arguments import at_least_one, nanogpt_checkout
from bench.timing import DEVICE, compared, facts, write_rows
from data.dataset import open_dataset
from eval.command import command_parser, leave_on_signals

ROOT = Path(__file__).resolve().parent.parent


def library_text() -> str:
    """Plain ASCII text that every machine has: sources of the standard library."""
    library = Path(os.__file__).parent
    text = "".join(path.read_text(errors="ignore") for path in sorted(library.glob("*.py")))
    return text.encode("ascii", errors="ignore").decode()[:1_100_000]


def random_text(n_words: int) -> str:
    """Random words, a tenth as many different ones as there are: a BPE finds merges enough."""
    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_lowercase, k=6)) for _ in range(n_words // 10)]
    return " ".join(draw.choices(words, k=n_words))


class Preset(NamedTuple):
    """What both train on, how, and which of the reported step times count."""

    text: Callable[[], str]
    tokenizer: list[str]  # arguments of data.text.prepare
    shape: dict[str, int]
    batch_size: int  # sequences a step
    micro_batch_size: int
    steps: int
    log_every: int
    warmup_rows: int  # reported times that are not measured
    is_padded: bool = False  # nanoGPT's vocabulary, to a multiple of 64
    compile_in_bf16: bool = False


def shape(n_layer: int, n_head: int, n_embd: int, block_size: int) -> dict[str, int]:
    return {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size}


def bpe(vocab_size: int) -> list[str]:
    return ["--tokenizer=bpe", f"--vocab_size={vocab_size}"]


PRESETS = {
    "cpu": Preset(
        library_text,
        ["--tokenizer=char"],
        shape(4, 4, 128, 64),
        batch_size=12,
        micro_batch_size=12,
        steps=300,
        log_every=10,
        warmup_rows=2,
    ),
    "gpt2": Preset(
        partial(random_text, 300_000),
        bpe(50_257),
        shape(12, 12, 768, 1024),
        batch_size=512,
        micro_batch_size=32,
        steps=30,
        log_every=1,
        warmup_rows=10,
        is_padded=True,
        compile_in_bf16=True,
    ),
    "tiny": Preset(
        partial(random_text, 3_000),
        bpe(301),
        shape(1, 1, 8, 8),
        batch_size=4,
        micro_batch_size=2,
        steps=7,
        log_every=1,
        warmup_rows=4,
        is_padded=True,
    ),
}


def prepare(folder: Path, chosen: Preset) -> int:
    """The same ids in both trainers' formats; returns the number of tokens in the vocabulary."""
    text, source = chosen.text(), folder / "corpus"
    source.mkdir()
    size = len(text) // 100
    for i in range(100):  # documents, so that there is something to split by
        (source / f"{i}.txt").write_text(text[i * size : (i + 1) * size])
    command = ["data.text.prepare", f"--input={source}", *chosen.tokenizer]
    command += ["--val_fraction=0.1", f"--out={folder / 'ours'}"]
    subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    dataset = open_dataset(folder / "ours")
    theirs = folder / "nanogpt" / "data" / "corpus"
    theirs.mkdir(parents=True)
    for split in ("train", "val"):
        tokens = [shard.tokens() for shard in dataset.split(split).shards]
        np.concatenate(tokens).tofile(theirs / f"{split}.bin")
    return dataset.tokenizer.n_vocab


def run_ours(folder: Path, chosen: Preset, round_number: int) -> tuple[float, float | None]:
    """Median milliseconds of a step, and model FLOP/s as a share of the peak, where it is known."""
    out = folder / f"out{round_number}"
    settings: dict[str, Any] = {**chosen.shape, "batch_size": chosen.batch_size}
    settings |= {"micro_batch_size": chosen.micro_batch_size, "dataset": folder / "ours"}
    settings |= {"out_dir": out, "max_steps": chosen.steps, "log_every": chosen.log_every}
    settings |= {"warmup_steps": 1, "eval_every": chosen.steps, "eval_batches": 1, "bias": "false"}
    settings |= {"device": DEVICE.type, "save_every": chosen.steps}
    if chosen.compile_in_bf16:
        settings |= {"compile": "true", "dtype": "bfloat16", "loader_workers": 1}
    run_train_py(settings, cwd=ROOT)
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    rows = [row for row in rows if row["kind"] == "train"][chosen.warmup_rows :]
    middle = sorted(rows, key=lambda row: row["step_ms"])[len(rows) // 2]
    return middle["step_ms"], middle["mfu"]


def run_nanogpt(folder: Path, chosen: Preset, vocab_size: int) -> float:
    """Median milliseconds of a step, from the times that nanoGPT prints."""
    settings: dict[str, Any] = {**chosen.shape, "batch_size": chosen.micro_batch_size}
    settings["gradient_accumulation_steps"] = chosen.batch_size // chosen.micro_batch_size
    settings |= {"dataset": "corpus", "device": DEVICE.type, "dropout": 0.0, "bias": False}
    settings |= {"max_iters": chosen.steps, "lr_decay_iters": chosen.steps, "warmup_iters": 1}
    settings |= {"log_interval": chosen.log_every, "eval_iters": 1}
    settings |= {"eval_interval": 10 * chosen.steps, "compile": chosen.compile_in_bf16}
    settings["dtype"] = "bfloat16" if chosen.compile_in_bf16 else "float32"
    multiple = 64 if chosen.is_padded else 1
    with (folder / "nanogpt/data/corpus/meta.pkl").open("wb") as file:
        pickle.dump({"vocab_size": math.ceil(vocab_size / multiple) * multiple}, file)
    printed = run_train_py(settings, cwd=folder / "nanogpt")
    times = [float(ms) for ms in re.findall(r"time ([\d.]+)ms", printed)]
    return statistics.median(times[chosen.warmup_rows :])


def run_train_py(settings: dict[str, Any], cwd: Path) -> str:
    """What `python train.py` prints there; what it complains of passes through."""
    command = [sys.executable, "train.py", *(f"--{key}={value}" for key, value in settings.items())]
    return subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout


def summary(
    chosen: Preset, vocab_size: int, times: dict[str, list[float]], share: float | None
) -> dict[str, Any]:
    """Tokens per second of each side, ours over nanoGPT's, and our share of the device's peak."""
    tokens = chosen.batch_size * chosen.shape["block_size"]
    result = compared(times)
    speeds = {side: 1e3 * tokens / ms for side, ms in result["ms"].items()}
    row = {"tokens": tokens, "vocab_size": vocab_size, **chosen.shape, "step_ms": times}
    row |= {"tokens_per_s": speeds, "mfu": share}
    if "nanogpt" in speeds:
        row["ratio"] = result["ratio"]["nanogpt"]  # of their time over ours
    return row


def main() -> None:
    parser = command_parser("bench.train_throughput", __doc__)
    parser.add_argument("--nanogpt", type=nanogpt_checkout, help="a checkout of nanoGPT")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--rounds", type=at_least_one, default=5)
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    parser.add_argument("--out", type=Path, help="write the result as JSON here")
    arguments = parser.parse_args()
    chosen = PRESETS[arguments.preset]
    if arguments.steps is not None:
        chosen = chosen._replace(steps=arguments.steps)
    if chosen.steps // chosen.log_every <= chosen.warmup_rows:
        parser.error(f"--steps {chosen.steps}: leaves none after the warm-up; use more")
    if chosen.compile_in_bf16 and DEVICE.type != "cuda":
        parser.error(f"--preset {arguments.preset} needs a CUDA GPU; use cpu")

    times: dict[str, list[float]] = {"ours": []} | ({"nanogpt": []} if arguments.nanogpt else {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocab_size = prepare(folder, chosen)
        for file in ("train.py", "model.py", "configurator.py") if arguments.nanogpt else ():
            shutil.copy(arguments.nanogpt / file, folder / "nanogpt")
        for round_number in range(arguments.rounds):
            ms, share = run_ours(folder, chosen, round_number)
            times["ours"].append(ms)
            if arguments.nanogpt:
                times["nanogpt"].append(run_nanogpt(folder, chosen, vocab_size))
            print({side: f"{values[-1]:.2f} ms" for side, values in times.items()}, flush=True)
            row = summary(chosen, vocab_size, times, share)
            write_rows(arguments.out, facts(DEVICE), [row])
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    leave_on_signals()  # and so remove the runs
    main()
