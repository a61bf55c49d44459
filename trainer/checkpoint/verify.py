"""Compare the files of a checkpoint with the hashes in its manifest."""

from pathlib import Path
from typing import Any

from data.files import sha256_of
from data.tokenizer import Tokenizer
from trainer.checkpoint.schema import CheckpointError


def verify_files(path: Path, manifest: dict[str, Any]) -> None:
    """Raise CheckpointError if a file of the checkpoint in `path` is missing or damaged.

    Also if tokenizer.json is whole, but is not the tokenizer of the run.
    """
    for name, entry in manifest["files"].items():
        _verify_file(path, name, entry)
    _check_tokenizer(path, manifest)


def manifest_entry(path: Path) -> dict[str, Any]:
    """Return the entry of a file in the manifest: its sha256 and its size."""
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}


def _verify_file(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Compare a file's size, then its hash, to tell truncation from corruption in the message."""
    file = path / name
    if not file.is_file():
        raise CheckpointError(f"{name} is missing")
    if file.stat().st_size != entry["bytes"]:
        raise CheckpointError(f"{name} has {file.stat().st_size} bytes, expected {entry['bytes']}")
    if manifest_entry(file) != entry:
        raise CheckpointError(f"{name} does not match its sha256")


def _check_tokenizer(path: Path, manifest: dict[str, Any]) -> None:
    """Raise CheckpointError unless tokenizer.json is the tokenizer of the run."""
    wanted = manifest["tokenizer_sha256"]
    if manifest["files"]["tokenizer.json"]["sha256"] == wanted:
        return
    try:
        found = Tokenizer.load(path / "tokenizer.json").sha256  # of its current format
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if found != wanted:
        raise CheckpointError("tokenizer.json is not the tokenizer that the run was trained with")
