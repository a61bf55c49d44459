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

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from model import GPTConfig
from optim.legacy_names import renamed_settings, renamed_state
from trainer.checkpoint import sharded
from trainer.checkpoint.schema import (
    CheckpointError,
    check_settings,
    check_train_tree,
    parse_manifest,
)
from trainer.checkpoint.tensors import weight_problems
from trainer.checkpoint.verify import verify_files
from trainer.sharding import shard_like

FOLDER = re.compile(r"step-\d{8}")
MAX_PROBLEMS = 5  # that one message lists
WRAPPER_PREFIXES = re.compile(r"^(?:(?:_orig_mod|module)\.)+")  # torch.compile, DDP, AveragedModel


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

    def is_of(self, out_dir: Path) -> bool:
        """Return whether the checkpoint is in the folder of the run `out_dir`."""
        return self.path.resolve().parent == (out_dir / "checkpoints").resolve()


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify all of one checkpoint folder.

    Names of an earlier release, in settings and in the preconditioner's state, become the current
    ones, with one warning.

    Raises:
        CheckpointError: a file is missing, damaged or unsafe, the content is not that of a
            checkpoint, or weights are not finite. The message names the file and the tensor.
    """
    try:
        manifest, digest = parse_manifest((path / "manifest.json").read_bytes())
        verify_files(path, manifest)
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged ({error})") from None
    try:
        tensors = _read_tensors(path, manifest)
        _rename(path, manifest, tensors["train"])
        manifest["config"] = check_settings(manifest["config"])
        _check_content(path, manifest, **tensors)
    except (CheckpointError, OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} refused ({error})") from error
    return Checkpoint(path, manifest["step"], manifest, digest, **tensors)


def candidates(root: Path) -> list[Path]:
    """Return the finished checkpoint folders under `root`, the newest step first."""
    return sorted((p for p in root.glob("step-*") if FOLDER.fullmatch(p.name)), reverse=True)


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


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
    """Load the newest checkpoint that is not damaged, and warn about newer ones, which are.

    Returns None if there are no checkpoints.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged. The message is about the
            oldest one; `warn` was called for the others.
    """
    paths = candidates(root)
    for path in paths:
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            if path == paths[-1]:
                raise CheckpointError(f"{error}; no older checkpoint is left in {root}") from error
            warn(f"warning: {error}; trying the previous one")
    return None


def load_into(model: nn.Module, state: Mapping[str, Tensor], where: Path) -> None:
    """Copy `state` into `model`, which may be wrapped or sharded; change nothing on an error.

    Raises:
        CheckpointError: lists every key that is missing, unexpected or has another shape.
    """
    own = check_fits(model, state, where)
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(shard_like(state[key], value))


def check_fits(model: nn.Module, state: Mapping[str, Any], where: Path) -> dict[str, Tensor]:
    """Raise CheckpointError as `load_into` does; return the model's tensors by plain name."""
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
    return own


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's tensors by name, without the prefixes of wrappers.

    Sharded tensors stay sharded. AveragedModel's counter `n_averaged` is left out.
    """
    return {
        WRAPPER_PREFIXES.sub("", key): value.detach()
        for key, value in model.state_dict().items()
        if key != "n_averaged"
    }


def _read_tensors(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what is in the files, {"model": ..., "ema": ..., "train": ...}."""
    try:
        train = torch.load(path / "train.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a pickle that it refuses
        raise CheckpointError(f"train.pt refused: {error}") from error
    if manifest.get("format") == "sharded":
        tree = sharded.stored(path / sharded.FOLDER, train)
        if not isinstance(tree, dict) or tree.keys() != {"model", "ema", "train"}:
            raise CheckpointError("train.pt must have exactly the keys model, ema and train")
        return tree
    files = {"model": path / "model.safetensors", "ema": path / "ema.safetensors"}
    try:
        tensors = {
            key: load_file(file) if file.name in manifest["files"] else None
            for key, file in files.items()
        }
    except SafetensorError as error:
        raise CheckpointError(f"not a file of safetensors: {error}") from error
    return tensors | {"train": train}


def _check_content(path: Path, manifest: dict[str, Any], model: Any, ema: Any, train: Any) -> None:
    """Raise CheckpointError, with the first problems, if this is not what a run saved."""
    check_train_tree(train)
    if FOLDER.fullmatch(path.name) and step_of(path) != manifest["step"]:
        raise CheckpointError(f"manifest.json is of step {manifest['step']}")
    config = GPTConfig(**manifest["model"])
    for name, weights in {"model": model, "ema": ema}.items():
        if name == "ema" and weights is None:
            continue
        if not isinstance(weights, dict):
            raise CheckpointError(f"{name} is a {type(weights).__name__}, but must be a dict")
        if problems := weight_problems(weights, config):
            raise CheckpointError(f"{name}: {'; '.join(problems[:MAX_PROBLEMS])}")


def _rename(path: Path, manifest: dict[str, Any], train: Any) -> None:
    """Give settings and the preconditioner's state their current names, with one warning."""
    manifest["config"], old_names = renamed_settings(manifest["config"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        state = renamed_state(train.get("dopr")) if isinstance(train, dict) else None
    if state is not None and state is not train["dopr"]:
        train["dopr"] = state
        old_names = [*old_names, "keys of the preconditioner's state"]
    if old_names:
        warnings.warn(
            f"checkpoint {path} has settings of an earlier release: {', '.join(old_names)}",
            FutureWarning,
            stacklevel=3,  # the caller of load_checkpoint
        )
