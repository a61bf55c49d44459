"""Find the checkpoint from which a run resumes, and refuse one that does not fit."""

import hashlib
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.dataset import Dataset
from trainer.checkpoint.read import (
    Checkpoint,
    CheckpointError,
    candidates,
    newest_good,
    open_checkpoint,
)
from trainer.checkpoint.schema import parse_manifest
from trainer.parallel import Parallel
from trainer.settings import ConfigError, TrainConfig


def check_agreement(config: TrainConfig, dataset: Dataset, parallel: Parallel) -> None:
    """Raise ConfigError unless all processes have the same settings and data."""
    facts = asdict(config) | {"hash of the data": fingerprint(dataset)}
    rows = parallel.gather(facts)
    if differing := [key for key in facts if len({repr(row[key]) for row in rows}) > 1]:
        values = {key: ", ".join(repr(row[key]) for row in rows) for key in differing}
        listed = "; ".join(f"{key}: {text}" for key, text in values.items())
        raise ConfigError(
            f"the processes differ, by rank, in {listed}. Start all of them with the same command, "
            "the same config files and the same data"
        )


def find_checkpoint(config: TrainConfig, dataset: Dataset, parallel: Parallel) -> Checkpoint | None:
    """Load the checkpoint selected by the setting `resume`; None for a new run.

    Raises:
        ConfigError: the setting would overwrite another run, or the checkpoint is past max_steps.
        CheckpointError: the checkpoint cannot be used, it belongs to another tokenizer, or the
            processes see different checkpoints.
    """
    found = _find_checkpoint(config, dataset)
    seen = parallel.gather(found and f"{found.path} ({found.digest[:12]})")
    if len({*seen}) > 1:
        raise CheckpointError(
            f"the processes see different checkpoints, by rank: {', '.join(map(str, seen))}; "
            "out_dir must be a folder that all processes share"
        )
    return found


def _find_checkpoint(config: TrainConfig, dataset: Dataset) -> Checkpoint | None:
    """Find the checkpoint in one process; see `find_checkpoint`."""
    out_dir = Path(config.out_dir)
    root = out_dir / "checkpoints"
    is_again = config.resume not in ("auto", "never") and _resume_of(root) == config.resume
    if is_again:
        print(
            f"resume={config.resume}: {out_dir} already holds the run that started there, which "
            "continues; to start there again, use a new out_dir"
        )
    if config.resume == "never":
        if candidates(root):
            raise ConfigError(
                f"resume=never, but {root} holds a run; choose another out_dir or resume=auto"
            )
        return None
    if config.resume == "auto" or is_again:
        try:
            found = newest_good(root)
        except CheckpointError as error:
            raise CheckpointError(f"{error}. Start again in a new out_dir") from error
    else:
        found = open_checkpoint(Path(config.resume))
    if found is None:
        return None
    if not found.is_of(out_dir) and candidates(root):
        raise ConfigError(
            f"resume={config.resume}, but {root} holds another run; use a new out_dir"
        )
    if found.step > config.max_steps:
        raise ConfigError(
            f"max_steps={config.max_steps}, but checkpoint {found.path} is past it; raise max_steps"
        )
    if found.manifest["tokenizer_sha256"] != dataset.tokenizer.sha256:
        raise CheckpointError(
            f"checkpoint {found.path} was trained with a different tokenizer than {dataset.dir}; "
            "resume it on the data that it was trained on"
        )
    if found.manifest["dataset_sha256"] != fingerprint(dataset):
        print(f"warning: {dataset.dir} is not the data that {found.path} was trained on")
    return found


def _resume_of(root: Path) -> str | None:
    """Return the setting `resume` of the run that wrote the newest readable checkpoint."""
    for path in candidates(root):
        with suppress(CheckpointError, OSError):
            return parse_manifest((path / "manifest.json").read_bytes())[0]["config"].get("resume")
    return None


def check_same_function(found: Checkpoint, model: dict[str, Any]) -> None:
    """Raise CheckpointError if the weights have the right shapes but belong to another function.

    Args:
        model: the model's settings, in the format of the checkpoint's manifest.
    """
    saved = found.manifest["model"]
    changed = [
        f"{key} was {saved[key]:g}, is {model[key]:g}"
        for key in ("n_head", "attention_mult", "logits_mult")
        if saved[key] != model[key]
    ]
    if changed:
        raise CheckpointError(
            f"checkpoint {found.path} was trained as another function of the same weights: "
            f"{'; '.join(changed)}; set n_head, mup, mup_base_width and mup_base_head_dim as in "
            "that run"
        )


def fingerprint(dataset: Dataset) -> str:
    """Return a hash of the dataset's content, which does not depend on its path."""
    splits = dataset.meta["splits"]
    hashes = [file["sha256"] for name in sorted(splits) for file in splits[name]["files"]]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()
