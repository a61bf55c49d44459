"""The content of a checkpoint that is as small as possible, and how to sign a changed one."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from model import GPT, GPTConfig
from trainer.checkpoint.schema import manifest_digest
from trainer.checkpoint.verify import manifest_entry

CONFIG = GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4, bias=False)
TOKENIZER = b"{}"
MANIFEST = {
    "config": {"seed": 1},
    "model": asdict(CONFIG),
    "optimizers": [],
    "tokenizer_sha256": hashlib.sha256(TOKENIZER).hexdigest(),
    "dataset_sha256": "0" * 64,
    "device": "cpu",
    "threads": 1,
    "python": "3",
    "torch": "2",
    "git": "unknown",
    "world": 1,
}
TRAIN = {"optimizers": [], "dopr": None, "n_averaged": 0, "skipped": 0, "skipped_in_row": 0}
FILES = {"train": TRAIN, "tokenizer_json": TOKENIZER, "manifest": MANIFEST, "keep": 2, "ema": None}


def gpt(**changes: Any) -> GPT:
    return GPT(GPTConfig(**asdict(CONFIG) | changes))


def change_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest of the checkpoint in `path`, and recompute the hashes of all files."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    for name in manifest["files"]:
        manifest["files"][name] = manifest_entry(path / name)
    change(manifest)
    manifest["sha256"] = manifest_digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def change_train(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the tree in train.pt, and recompute the hashes."""
    tree = torch.load(path / "train.pt", weights_only=True)
    change(tree)
    torch.save(tree, path / "train.pt")
    change_manifest(path, lambda manifest: None)
