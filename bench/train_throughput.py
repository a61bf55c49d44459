"""Does our training loop cost more than nanoGPT's? Tokens per second of both, run alternately.

    python -m bench.train_throughput --nanogpt ../nanoGPT [--rounds 5] [--steps 300]

Both train the model of nanoGPT's CPU example (4 layers, 4 heads, 128 wide, block 64, batch 12,
fp32, no dropout, no compile) on the same characters, through its own command line in a process of
its own. A run's figure is the median of the step times that it reports, data loading included.
Without --nanogpt only our side is measured.
"""

import json
import os
import pickle
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from eval.command import command_parser

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12}
TOKENS_PER_STEP = SHAPE["batch_size"] * SHAPE["block_size"]
WARMUP_ROWS = 2  # reported times that are not measured, ten steps each


def corpus() -> str:
    """Plain ASCII text that every machine has: sources of the standard library."""
    library = Path(os.__file__).parent
    text = "".join(path.read_text(errors="ignore") for path in sorted(library.glob("*.py")))
    return text.encode("ascii", errors="ignore").decode()[:1_100_000]


def prepare(folder: Path, text: str) -> None:
    """The same characters in both trainers' formats."""
    source = folder / "corpus"
    source.mkdir()
    for i in range(100):  # documents, so that there is something to split by
        size = len(text) // 100
        (source / f"{i}.txt").write_text(text[i * size : (i + 1) * size])
    command = ["data.text.prepare", f"--input={source}", "--tokenizer=char"]
    command += ["--val_fraction=0.1", f"--out={folder / 'ours'}"]
    subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = np.array([ids[character] for character in text], dtype=np.uint16)
    theirs = folder / "nanogpt" / "data" / "corpus"
    theirs.mkdir(parents=True)
    split = int(0.9 * len(tokens))
    tokens[:split].tofile(theirs / "train.bin")
    tokens[split:].tofile(theirs / "val.bin")
    with (theirs / "meta.pkl").open("wb") as file:
        pickle.dump({"vocab_size": len(ids)}, file)


def run_ours(folder: Path, steps: int, round_number: int) -> float:
    """Median milliseconds of a step."""
    out = folder / f"out{round_number}"
    settings = SHAPE | {"micro_batch_size": SHAPE["batch_size"], "dataset": folder / "ours"}
    settings |= {"out_dir": out, "max_steps": steps, "warmup_steps": 10, "log_every": 10}
    settings |= {"eval_every": steps, "eval_batches": 1, "bias": "false", "device": "cpu"}
    command = [sys.executable, "train.py", *(f"--{key}={value}" for key, value in settings.items())]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    times = [row["step_ms"] for row in rows if row["kind"] == "train"]
    return statistics.median(times[WARMUP_ROWS:])


def run_nanogpt(folder: Path, steps: int) -> float:
    """Median milliseconds of a step, from the times that nanoGPT prints."""
    settings = SHAPE | {"dataset": "corpus", "device": "cpu", "compile": False, "dropout": 0.0}
    settings |= {"max_iters": steps, "lr_decay_iters": steps, "log_interval": 10, "eval_iters": 1}
    settings |= {"eval_interval": 10 * steps, "warmup_iters": 10, "bias": False}
    settings |= {"gradient_accumulation_steps": 1, "dtype": "float32"}
    command = [sys.executable, "train.py", *(f"--{key}={value}" for key, value in settings.items())]
    result = subprocess.run(
        command, cwd=folder / "nanogpt", check=True, capture_output=True, text=True
    )
    times = [float(ms) for ms in re.findall(r"time ([\d.]+)ms", result.stdout)]
    return statistics.median(times[WARMUP_ROWS:])


def main() -> None:
    parser = command_parser("train_throughput", __doc__, "bench")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, help="write the result as JSON here")
    arguments = parser.parse_args()

    times: dict[str, list[float]] = {"ours": [], "nanogpt": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, corpus())
        if arguments.nanogpt:
            for file in ("train.py", "model.py", "configurator.py"):
                shutil.copy(arguments.nanogpt / file, folder / "nanogpt")
        for round_number in range(arguments.rounds):
            times["ours"].append(run_ours(folder, arguments.steps, round_number))
            if arguments.nanogpt:
                times["nanogpt"].append(run_nanogpt(folder, arguments.steps))
            print({side: f"{values[-1]:.2f} ms" for side, values in times.items() if values})

    result = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    result |= {"threads": torch.get_num_threads(), "step_ms": times, **SHAPE}
    medians = {side: statistics.median(values) for side, values in times.items() if values}
    result["tokens_per_s"] = {side: 1e3 * TOKENS_PER_STEP / ms for side, ms in medians.items()}
    if "nanogpt" in medians:
        result["ratio"] = medians["nanogpt"] / medians["ours"]  # > 1: ours is faster
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
