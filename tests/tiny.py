"""Write a data set and the settings of a run that are small enough to train in a test."""

import json
from pathlib import Path

import numpy as np

from data.meta import empty_split, write_meta
from data.shards import write_shard
from data.tokenizer import byte_tokenizer

SETTINGS = {  # a run that takes a second
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 16,
    "batch_size": 8,
    "micro_batch_size": 4,
    "max_steps": 12,
    "warmup_steps": 2,
    "lr": 3e-3,
    "eval_every": 6,
    "eval_batches": 2,
    "save_every": 4,
    "log_every": 1,
    "device": "cpu",
}


def write_dataset(folder: Path, train_tokens: int = 4000, seed: int = 0) -> Path:
    """Write random words as bytes, with enough structure that training lowers the loss."""
    folder.mkdir(parents=True)
    tokenizer = byte_tokenizer()
    tokenizer.save(folder / "tokenizer.json")
    random = np.random.default_rng(seed)
    splits = {}
    for name, size in (("train", train_tokens), ("val", 600)):
        words = random.choice([b"alpha ", b"beta ", b"gamma "], size=size // 4)
        tokens = np.frombuffer(b"".join(words), dtype=np.uint8)[:size].astype(np.uint16)
        entry = write_shard(folder / f"{name}_000000.bin", [tokens])
        splits[name] = empty_split() | {"tokens": size, "documents": 1, "text_bytes": size}
        splits[name]["files"] = [entry]
    write_meta(folder, {"name": "tiny"}, tokenizer, splits)
    return folder


def argv(folder: Path, out: Path, **changes: object) -> list[str]:
    """Return the command line of a tiny run on the data set in `folder`."""
    settings = SETTINGS | {"dataset": folder, "out_dir": out} | changes
    return [f"--{key}={value}" for key, value in settings.items()]


def metrics(out_dir: Path, kind: str) -> list[dict]:
    """Return the rows of one kind in a run's metrics.jsonl."""
    rows = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


def weights(out_dir: Path, step: int) -> bytes:
    """Return the bytes of a checkpoint's weights."""
    return (out_dir / f"checkpoints/step-{step:08d}/model.safetensors").read_bytes()
