"""Write checkpoints atomically; `read.py` describes their content.

A save writes `step-N.tmp/`, syncs its files and the folder to disk, renames it, updates `latest`
and removes old checkpoints. A crash at any time leaves the previous checkpoint intact, and the next
save removes the temporary folder. If a run was resumed from an earlier step, its next save renames
the later folders to `abandoned-step-N`. `background.py` calls these functions in a thread.
"""

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
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
    partial = root / f"step-{step:08d}.tmp"
    with _checkpoint_errors(partial, is_main=True):
        _create(partial)
        for name, weights in {"model": model, "ema": ema}.items():
            if weights is not None:
                tensors = {key: value.contiguous() for key, value in weights.items()}
                save_file(tensors, partial / f"{name}.safetensors")
        _finish(partial, train, tokenizer_json, {**manifest, "step": step}, keep)
    return partial.with_suffix("")


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
    tensors = {"model": dict(model), "ema": ema and dict(ema), "train": train}
    files: dict[str, Any] = {"tokenizer_json": tokenizer_json, "manifest": manifest, "keep": keep}
    write = start_sharded(root, step, parallel, tensors=tensors, **files)
    return parallel.raise_on_all_ranks(write, CheckpointError)


def start_sharded(
    root: Path,
    step: int,
    parallel: Parallel,
    *,
    tensors: dict[str, Any],
    tokenizer_json: bytes,
    manifest: dict[str, Any],
    keep: int,
    group: Any = None,
) -> Callable[[], Path]:
    """Create the temporary folder, and return the function that does the rest of `save_sharded`.

    All processes must call this in their main threads. Each of them must then call the function,
    which raises CheckpointError. It communicates only in the process group `group`, so another
    thread may call it if no one else uses the group and the tensors.
    """
    partial = root / f"step-{step:08d}.tmp"
    facts = {**manifest, "step": step, "format": "sharded"}

    def create() -> None:
        if parallel.is_main:
            _create(partial)

    def write() -> Path:
        with _checkpoint_errors(partial, is_main=parallel.is_main):
            shards, is_alone = partial / sharded.FOLDER, parallel.size == 1
            tree = sharded.write(shards, tensors, is_alone=is_alone, group=group)
            if parallel.is_main:  # all processes have written
                sharded.check_complete(shards)
                _finish(partial, tree, tokenizer_json, facts, keep)
        return partial.with_suffix("")

    with _checkpoint_errors(partial, is_main=parallel.is_main):
        parallel.raise_on_all_ranks(create, OSError)
    return write


@contextmanager
def _checkpoint_errors(partial: Path, *, is_main: bool) -> Iterator[None]:
    """On an error, remove the temporary folder `partial` and raise CheckpointError."""
    root = partial.parent
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer raises RuntimeError
        is_full = any(text in str(error) for text in DISK_FULL)
        if is_main:
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
    publish(partial, partial.with_suffix(""))
    _prune(partial.parent, keep)


def publish(partial: Path, final: Path) -> None:
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


def _create(partial: Path) -> None:
    """Create a temporary folder, and remove those that crashes have left."""
    for path in partial.parent.glob("step-*.tmp"):
        shutil.rmtree(path)
    partial.mkdir(parents=True)


def _prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in candidates(root)[keep:]:
        shutil.rmtree(path)
