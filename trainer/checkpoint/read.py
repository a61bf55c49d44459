"""Read checkpoints and verify them before use.

    out_dir/checkpoints/step-00000020/
        model.safetensors   weights, under names without the prefixes of wrappers
        ema.safetensors     averaged weights, if the run keeps them
        train.pt            optimizers and counters, loaded with `weights_only=True`
        tokenizer.json      lets a checkpoint be sampled without the dataset
        manifest.json       schema, config, size and sha256 of every file above
    With checkpoint_format=sharded, the tensors of the first three are in shards/ (sharded.py).

    out_dir/checkpoints/latest    name of the newest folder, for people; no code reads it

`write.py` writes checkpoints.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from data.files import sha256_of
from optim.legacy_names import renamed_settings
from trainer.checkpoint import sharded
from trainer.sharding import shard_like

SCHEMA = 1  # version of the folder's layout
FOLDER = re.compile(r"step-\d{8}")
WRAPPER_PREFIXES = re.compile(r"^(?:(?:_orig_mod|module)\.)+")  # torch.compile, DDP, AveragedModel


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used: it is damaged, or of another schema, model or run."""


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint, on the CPU. If it is sharded, its tensors are `StoredTensor`s."""

    path: Path
    step: int
    manifest: dict[str, Any]
    digest: str  # sha256 of the manifest on disk, which includes the hashes of all files
    model: dict[str, Any]
    ema: dict[str, Any] | None
    train: dict[str, Any]


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify all of one checkpoint folder.

    Settings in the manifest that have names of an earlier release are renamed, with one warning.

    Raises:
        CheckpointError: a file is missing, damaged or unsafe; the message names it.
    """
    manifest, digest = _read_manifest(path)
    for name, entry in manifest["files"].items():
        _verify(path, name, entry)
    try:
        train = torch.load(path / "train.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a pickle that it refuses
        raise CheckpointError(f"checkpoint {path}: train.pt refused ({error})") from error
    _rename_settings(path, manifest)
    facts = {"path": path, "step": manifest["step"], "manifest": manifest, "digest": digest}
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
    """Return the finished checkpoint folders under `root`, the newest step first."""
    return sorted((p for p in root.glob("step-*") if FOLDER.fullmatch(p.name)), reverse=True)


def open_checkpoint(path: Path) -> Checkpoint:
    """Load the checkpoint folder `path`, or the newest good checkpoint of the out_dir `path`.

    Raises:
        CheckpointError: there is no checkpoint, or none that can be used.
    """
    if (path / "checkpoints").is_dir():
        newest = newest_good(path / "checkpoints")
        if newest is not None:
            return newest
    if not (path / "manifest.json").is_file():
        raise CheckpointError(
            f"no checkpoint at {path}: expected a run's out_dir or a folder step-N with "
            "manifest.json"
        )
    return load_checkpoint(path)


def newest_good(root: Path, warn: Callable[[str], None] = print) -> Checkpoint | None:
    """Load the newest checkpoint that is not damaged, and warn about those that are.

    Returns None if there are no checkpoints.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    reasons = []
    for path in candidates(root):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            reasons.append(str(error))
            warn(f"warning: {error}; trying the previous one")
    if reasons:
        raise CheckpointError(
            f"no usable checkpoint under {root}: "
            + "; ".join(reasons)
            + ". Start again in a new out_dir."
        )
    return None


def load_into(model: nn.Module, state: Mapping[str, Tensor], where: Path) -> None:
    """Copy `state` into `model`, which may be wrapped or sharded; change nothing on an error.

    Raises:
        CheckpointError: lists every key that is missing, unexpected or has another shape.
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
            value.copy_(shard_like(state[key], value))


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's tensors by name, without the prefixes of wrappers.

    Sharded tensors stay sharded. AveragedModel's counter `n_averaged` is left out.
    """
    return {
        WRAPPER_PREFIXES.sub("", key): value.detach()
        for key, value in model.state_dict().items()
        if key != "n_averaged"
    }


def _read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """Return the content of manifest.json without its own hash, and that hash."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        schema, digest = manifest["schema"], manifest.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged (manifest.json: {error})") from error
    if schema != SCHEMA:
        raise CheckpointError(
            f"checkpoint {path} has schema {schema}, but this version reads schema {SCHEMA}"
        )
    if digest != manifest_digest(manifest):
        raise CheckpointError(f"checkpoint {path} is damaged (manifest.json has a wrong sha256)")
    return manifest, digest


def _verify(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Compare a file's size, then its hash, to tell truncation from corruption in the message."""
    file = path / name
    if not file.is_file():
        raise CheckpointError(f"checkpoint {path} is damaged ({name} is missing)")
    if file.stat().st_size != entry["bytes"]:
        raise CheckpointError(
            f"checkpoint {path} is damaged ({name} has {file.stat().st_size} bytes, "
            f"expected {entry['bytes']})"
        )
    if manifest_entry(file) != entry:
        raise CheckpointError(f"checkpoint {path} is damaged ({name} does not match its sha256)")


def _rename_settings(path: Path, manifest: dict[str, Any]) -> None:
    """Give the settings of the run that saved the checkpoint their current names."""
    settings, old_names = renamed_settings(manifest.get("config", {}))
    if old_names:
        manifest["config"] = settings
        warnings.warn(
            f"checkpoint {path} has settings of an earlier release: {', '.join(old_names)}",
            FutureWarning,
            stacklevel=3,  # the caller of load_checkpoint
        )


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Return the sha256 of a manifest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def manifest_entry(path: Path) -> dict[str, Any]:
    """Return the entry of a file in the manifest: its sha256 and its size."""
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}
