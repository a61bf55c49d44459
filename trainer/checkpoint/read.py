"""Checkpoints: everything a run is, in one folder, verified before it is used.

    out_dir/checkpoints/step-00000020/
        model.safetensors   weights, under names without any wrapper's prefix
        ema.safetensors     averaged weights, when the run keeps them
        train.pt            optimizers and counters, safe to load (`weights_only`)
        tokenizer.json      so that a checkpoint can be sampled anywhere
        manifest.json       schema, config, size and sha256 of every file above
    With checkpoint_format=sharded: shards/ (sharded.py) instead of the tensors in the first three.

    out_dir/checkpoints/latest    the name of the newest folder, written last; for people

saving.py writes them.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.checkpoint import sharded
from trainer.sharding import laid_out

SCHEMA = 1  # of the folder's layout
FOLDER = re.compile(r"step-\d{8}")
WRAPPER_PREFIXES = re.compile(r"^(?:(?:_orig_mod|module)\.)+")  # torch.compile, DDP, AveragedModel


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: damaged, of another schema, or of another shape."""


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint, on the CPU; of a sharded one, each tensor is a `sharded.Stored`."""

    path: Path
    step: int
    manifest: dict[str, Any]
    model: dict[str, Any]
    ema: dict[str, Any] | None
    train: dict[str, Any]

    @property
    def digest(self) -> str:
        """Of everything that the manifest says, the hashes of all files included."""
        return digest_of(self.manifest)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint folder, all of it, before anything is handed out.

    Raises:
        CheckpointError: what is wrong with which file; nothing was half-loaded, no code was run.
    """
    manifest = _read_manifest(path)
    for name, wanted in manifest["files"].items():
        _verify(path, name, wanted)
    try:
        train = torch.load(path / "train.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a pickle that it will not run
        raise CheckpointError(f"checkpoint {path}: train.pt refused ({error})") from error
    facts = {"path": path, "step": manifest["step"], "manifest": manifest}
    if manifest.get("format") == "sharded":
        try:
            return Checkpoint(**facts, **sharded.stored(path / sharded.FOLDER, train))
        except ValueError as error:
            raise CheckpointError(f"checkpoint {path} refused ({error})") from error
    ema = path / "ema.safetensors"
    return Checkpoint(
        **facts,
        model=load_file(path / "model.safetensors"),
        ema=load_file(ema) if ema.name in manifest["files"] else None,
        train=train,
    )


def candidates(root: Path) -> list[Path]:
    """The finished checkpoint folders under `root`, the newest step first."""
    return sorted((p for p in root.glob("step-*") if FOLDER.fullmatch(p.name)), reverse=True)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: one checkpoint's folder, or the newest good one of an out_dir.

    Raises:
        CheckpointError: there is none, or none that can be used.
    """
    if (path / "checkpoints").is_dir():
        newest = newest_good(path / "checkpoints")
        if newest is not None:
            return newest
    if not (path / "manifest.json").is_file():
        raise CheckpointError(
            f"no checkpoint at {path}: wanted a run's out_dir or a folder step-N with manifest.json"
        )
    return load_checkpoint(path)


def newest_good(root: Path, warn: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint that verifies; says which damaged ones were passed over.

    Raises:
        CheckpointError: there are checkpoints, but none can be used.
    """
    reasons = []
    for path in candidates(root):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            reasons.append(str(error))
            warn(f"warning: {error}; trying the one before it")
    if reasons:
        raise CheckpointError(
            f"no usable checkpoint under {root}: "
            + "; ".join(reasons)
            + ". Start again in a new out_dir."
        )
    return None


def load_into(model: nn.Module, state: Mapping[str, Tensor], where: Path) -> None:
    """Copy `state` into `model`, wrapped, sharded or not; all of it or nothing.

    Raises:
        CheckpointError: lists every key that is missing, unexpected or of another shape.
    """
    own = {WRAPPER_PREFIXES.sub("", key): value for key, value in model.state_dict().items()}
    problems = [f"missing {key}" for key in own.keys() - state.keys()]
    problems += [f"unexpected {key}" for key in state.keys() - own.keys()]
    problems += [
        f"{key} is {tuple(state[key].shape)}, the model's is {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    ]
    if problems:
        raise CheckpointError(
            f"checkpoint {where} does not fit this model: " + "; ".join(sorted(problems))
        )
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(laid_out(state[key], value))


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by name, as they lie, without the prefixes of wrappers.

    `n_averaged` is AveragedModel's own counter and no part of the model.
    """
    return {
        WRAPPER_PREFIXES.sub("", key): value.detach()
        for key, value in model.state_dict().items()
        if key != "n_averaged"
    }


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by a file with `text`, or leave it as it was; several writers may try."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        partial.write_text(text)
        fsync(partial)
        partial.replace(path)
        fsync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        schema, digest = manifest["schema"], manifest.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged (manifest.json: {error})") from error
    if schema != SCHEMA:
        raise CheckpointError(
            f"checkpoint {path} has schema {schema}, this version reads schema {SCHEMA}"
        )
    if digest != digest_of(manifest):
        raise CheckpointError(f"checkpoint {path} is damaged (manifest.json does not match itself)")
    return manifest


def _verify(path: Path, name: str, wanted: dict[str, Any]) -> None:
    """The file's size, then its hash: truncation is told apart from corruption."""
    file = path / name
    if not file.is_file():
        raise CheckpointError(f"checkpoint {path} is damaged ({name} is missing)")
    if file.stat().st_size != wanted["bytes"]:
        raise CheckpointError(
            f"checkpoint {path} is damaged ({name} has {file.stat().st_size} bytes, "
            f"{wanted['bytes']} were written)"
        )
    if fingerprint_of(file) != wanted:
        raise CheckpointError(f"checkpoint {path} is damaged ({name} does not match its sha256)")


def digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def fingerprint_of(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def fsync(path: Path) -> None:
    """Force a file's content or a folder's entries onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
