"""Checkpoints are written whole or not at all; checkpoint.py says what is in them.

Protocol: write `step-N.tmp/`, fsync files and folder, rename, update `latest`, prune. A crash at
any instant leaves the previous checkpoint intact; the next save removes what it left behind. A run
that goes back to an earlier step renames the later folders to `abandoned-step-N` when it saves.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trainer.checkpoint import sharded
from trainer.checkpoint.read import (
    SCHEMA,
    CheckpointError,
    candidates,
    digest_of,
    fingerprint_of,
    fsync,
    write_atomic,
)
from trainer.parallel import Parallel


def save_checkpoint(
    root: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None,
    train: dict[str, Any],
    tokenizer_json: bytes,
    manifest: dict[str, Any],
    keep: int,
) -> Path:
    """Write `root/step-N` so that it exists whole or not at all; keep the newest `keep`.

    Args:
        model, ema: weights on the CPU, see `plain_state`.
        train: nested dicts and lists of tensors and Python scalars only (`weights_only`-safe).
        manifest: JSON-able facts about the run; schema, step and hashes are added here.
    Raises:
        CheckpointError: it could not be written (disk full, ...); earlier ones are untouched.
    """
    with _written_folder(root, step) as partial:
        for name, weights in {"model": model, "ema": ema}.items():
            if weights is not None:
                whole = {key: value.contiguous() for key, value in weights.items()}
                save_file(whole, partial / f"{name}.safetensors")
        _finish(partial, train, tokenizer_json, {**manifest, "step": step}, keep)
    return root / partial.stem


def save_sharded(
    root: Path,
    step: int,
    parallel: Parallel,
    *,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None,
    train: dict[str, Any],
    tokenizer_json: bytes,
    manifest: dict[str, Any],
    keep: int,
) -> Path:
    """The same, with every tensor in shards/ (sharded.py). All processes of the world call this.

    Every process writes what it holds of the tensors, so that they need not fit anywhere whole.
    """
    with _written_folder(root, step, parallel) as partial:
        whole = {"model": dict(model), "ema": ema and dict(ema), "train": train}
        marked = sharded.write(partial / sharded.FOLDER, whole, is_alone=parallel.size == 1)
        facts = {**manifest, "step": step, "format": "sharded"}

        def finish() -> None:
            try:
                sharded.check_complete(partial / sharded.FOLDER)
                _finish(partial, marked, tokenizer_json, facts, keep)
            except (OSError, ValueError) as error:
                raise RuntimeError(error) from error

        parallel.raise_on_all_ranks(finish if parallel.is_main else lambda: None, RuntimeError)
    return root / partial.stem


@contextmanager
def _written_folder(root: Path, step: int, parallel: Parallel | None = None) -> Iterator[Path]:
    """An empty folder to write to; what goes wrong is a CheckpointError, and the folder gone."""
    partial = root / f"step-{step:08d}.tmp"

    def start() -> None:
        _remove_leftovers(root)
        partial.mkdir(parents=True)

    try:
        if parallel is None:
            start()
        else:
            parallel.raise_on_all_ranks(start if parallel.is_main else lambda: None, OSError)
        yield partial
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer raises RuntimeError
        if parallel is None or parallel.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        name = partial.with_suffix("")
        raise CheckpointError(f"checkpoint {name} could not be written: {error}") from error


def _finish(
    partial: Path, train: Any, tokenizer_json: bytes, manifest: dict[str, Any], keep: int
) -> None:
    """Write what is left, then the manifest over all files, and make the folder visible."""
    torch.save(train, partial / "train.pt")
    (partial / "tokenizer.json").write_bytes(tokenizer_json)
    names = {str(path.relative_to(partial)): path for path in _files(partial)}
    files = {name: fingerprint_of(path) for name, path in names.items()}
    whole = {"schema": SCHEMA, **manifest, "files": files}
    whole["sha256"] = digest_of(whole)
    (partial / "manifest.json").write_text(json.dumps(whole, indent=2) + "\n")
    _publish(partial, partial.with_suffix(""))
    _prune(partial.parent, keep)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _publish(partial: Path, final: Path) -> None:
    """Make a completely written folder durable, then visible, then the latest."""
    for path in [*partial.rglob("*"), partial]:
        fsync(path)
    for path in candidates(final.parent):
        if path.name >= final.name:  # of an earlier life of this run, which went back before it
            shutil.rmtree(path.with_name(f"abandoned-{path.name}"), ignore_errors=True)
            path.rename(path.with_name(f"abandoned-{path.name}"))
    partial.rename(final)
    fsync(final.parent)
    write_atomic(final.parent / "latest", final.name + "\n")


def _remove_leftovers(root: Path) -> None:
    for path in root.glob("step-*.tmp"):
        shutil.rmtree(path)


def _prune(root: Path, keep: int) -> None:
    """Remove all but the newest checkpoints; the one just written is the newest."""
    for path in candidates(root)[keep:]:
        shutil.rmtree(path)
