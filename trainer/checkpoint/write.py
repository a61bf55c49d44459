"""Write checkpoints atomically; `read.py` describes their content.

A save writes `step-N.tmp/`, syncs its files and the folder to disk, renames it, updates `latest`
and removes old checkpoints. A crash at any time leaves the previous checkpoint intact, and the next
save removes the temporary folder. If a run was resumed from an earlier step, its next save renames
the later folders to `abandoned-step-N`.
"""

import errno
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

from data.files import fsync, write_atomic
from trainer.checkpoint import sharded
from trainer.checkpoint.read import candidates
from trainer.checkpoint.schema import SCHEMA, CheckpointError, manifest_digest
from trainer.checkpoint.verify import manifest_entry
from trainer.parallel import Parallel

DISK_FULL = ("No space left", "os error 28", "quota exceeded", "os error 122")  # in messages
PROBE_BYTES = 2**20


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
    """Write the checkpoint `root/step-N` atomically and remove all but the newest `keep`.

    Args:
        model, ema: weights on the CPU; see `plain_state`.
        train: nested dicts and lists that hold only tensors and Python scalars.
        tokenizer_json: content of tokenizer.json.
        manifest: JSON-serializable facts about the run, to which schema, step and hashes are added.
        keep: number of checkpoints to keep.
    Raises:
        CheckpointError: the checkpoint could not be written; earlier ones are untouched.
    """
    with _written_folder(root, step) as partial:
        for name, weights in {"model": model, "ema": ema}.items():
            if weights is not None:
                tensors = {key: value.contiguous() for key, value in weights.items()}
                save_file(tensors, partial / f"{name}.safetensors")
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
    """Write a checkpoint like `save_checkpoint`, but with all tensors in shards (sharded.py).

    Every process writes the parts that it holds, so no process needs memory for full tensors. All
    processes must call this.
    """
    with _written_folder(root, step, parallel) as partial:
        tensors = {"model": dict(model), "ema": ema and dict(ema), "train": train}
        tree = sharded.write(partial / sharded.FOLDER, tensors, is_alone=parallel.size == 1)
        facts = {**manifest, "step": step, "format": "sharded"}

        def finish() -> None:
            try:
                sharded.check_complete(partial / sharded.FOLDER)
                _finish(partial, tree, tokenizer_json, facts, keep)
            except (OSError, ValueError) as error:
                raise RuntimeError(error) from error

        parallel.raise_on_all_ranks(finish if parallel.is_main else lambda: None, RuntimeError)
    return root / partial.stem


@contextmanager
def _written_folder(root: Path, step: int, parallel: Parallel | None = None) -> Iterator[Path]:
    """Create a temporary folder; on an error, remove it and raise CheckpointError."""
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
        is_full = any(text in str(error) for text in DISK_FULL)
        if parallel is None or parallel.is_main:
            is_full |= _is_disk_full(partial)
            shutil.rmtree(partial, ignore_errors=True)
        reason = f"no space left in {root} for a file of its size" if is_full else str(error)
        intact = next(
            (f"{path.name} is intact" for path in candidates(root)), "there is no earlier one"
        )
        raise CheckpointError(
            f"checkpoint {partial.with_suffix('')} could not be written: {reason}; {intact}"
        ) from error


def _is_disk_full(folder: Path) -> bool:
    """Try to write a file in the folder: torch and safetensors do not always say what failed."""
    try:
        with (folder / "probe").open("wb", buffering=0) as file:
            return file.write(bytes(PROBE_BYTES)) < PROBE_BYTES
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _finish(
    partial: Path, train: Any, tokenizer_json: bytes, manifest: dict[str, Any], keep: int
) -> None:
    """Write the remaining files and the manifest, rename the folder, and remove old checkpoints."""
    torch.save(train, partial / "train.pt")
    (partial / "tokenizer.json").write_bytes(tokenizer_json)
    paths = sorted(path for path in partial.rglob("*") if path.is_file())
    files = {str(path.relative_to(partial)): manifest_entry(path) for path in paths}
    complete = {"schema": SCHEMA, **manifest, "files": files}
    complete["sha256"] = manifest_digest(complete)
    (partial / "manifest.json").write_text(json.dumps(complete, indent=2) + "\n")
    _publish(partial, partial.with_suffix(""))
    _prune(partial.parent, keep)


def _publish(partial: Path, final: Path) -> None:
    """Sync a completely written folder to disk, rename it, and update `latest`."""
    for path in [*partial.rglob("*"), partial]:
        fsync(path)
    for path in candidates(final.parent):
        if path.name >= final.name:  # the run was resumed from a step before this one
            shutil.rmtree(path.with_name(f"abandoned-{path.name}"), ignore_errors=True)
            path.rename(path.with_name(f"abandoned-{path.name}"))
    partial.rename(final)
    fsync(final.parent)
    write_atomic(final.parent / "latest", final.name + "\n")


def _remove_leftovers(root: Path) -> None:
    for path in root.glob("step-*.tmp"):
        shutil.rmtree(path)


def _prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in candidates(root)[keep:]:
        shutil.rmtree(path)
