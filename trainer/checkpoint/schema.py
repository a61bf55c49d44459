"""Declare the content of a checkpoint's manifest.json and train.pt, and check it when it is read.

A manifest whose hashes fit can still be wrong: hashes tell damage, not intent.
"""

import hashlib
import json
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from data.schema import OpenSchema, Schema, checked_json, listed, parse_json
from model import GPTConfig
from trainer.config import coerce
from trainer.settings import FIELDS, ConfigError

SCHEMA = 1  # version of the folder's layout
LARGEST = 2**53  # of a counter
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Step = Annotated[int, Field(ge=0, le=99_999_999)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^(shards/)?[A-Za-z0-9._]+$")]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used: it is damaged, or of another schema, model or run."""


class Version(OpenSchema):
    """The one key that the manifests of all versions have."""

    schema_: int = Field(alias="schema")


class FileEntry(Schema):
    """The entry of a file in a manifest."""

    sha256: Sha256
    bytes: Count


class Manifest(OpenSchema):
    """The facts about a checkpoint and the run that saved it."""

    step: Step
    sha256: Sha256  # of the rest
    format: Literal["full", "sharded"] = "full"
    files: dict[FileName, FileEntry]
    config: dict[str, bool | int | float | str | None]
    model: GPTConfig
    optimizers: list[str]
    tokenizer_sha256: Sha256
    dataset_sha256: Sha256
    device: str
    threads: Count
    python: str
    torch: str
    git: str
    world: Count


class LayerNumbers(OpenSchema):
    """The values of a preconditioner's layer that are not tensors."""

    step: Count
    next_refresh: Count
    n_refreshes: Count
    n_fallbacks: Count
    made_with: dict[str, bool | int | float | str | None]


class TrainTree(Schema):
    """The content of train.pt; tensors.py checks its tensors."""

    optimizers: list[dict[Count, dict[str, Any]]]
    groups: list[list[dict[str, Any]]] = Field(default_factory=list)  # none in earlier versions
    dopr: dict[str, dict[str, Any]] | None
    n_averaged: Count
    skipped: Step
    skipped_in_row: Step


def parse_manifest(content: bytes) -> tuple[dict[str, Any], str]:
    """Return a manifest without its own hash, and that hash.

    All fields of `model` are present. Settings that are missing because the run is older than they
    are have their defaults.

    Raises:
        CheckpointError: the content is of another schema, damaged, or not a manifest.
    """
    found = parse_json(content, "manifest.json", Version, CheckpointError)
    if found.schema_ != SCHEMA:
        raise CheckpointError(
            f"it has schema {found.schema_}, but this version reads schema {SCHEMA}"
        )
    checked, manifest = checked_json(content, "manifest.json", Manifest, CheckpointError)
    del manifest["sha256"]
    if checked.sha256 != manifest_digest(manifest):
        raise CheckpointError("manifest.json has a wrong sha256")
    needed = {"train.pt", "tokenizer.json"}
    needed |= {"model.safetensors"} if checked.format == "full" else {"shards/.metadata"}
    if absent := needed - checked.files.keys():
        raise CheckpointError(f"manifest.json lists no {', '.join(sorted(absent))}")
    return manifest | {"model": asdict(checked.model)}, checked.sha256


def check_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the run that saved a checkpoint, with defaults for missing ones.

    Raises:
        CheckpointError: a setting has a value of a wrong type.
    """
    try:
        known = {key: coerce(key, value) for key, value in settings.items() if key in FIELDS}
    except ConfigError as error:
        raise CheckpointError(f"manifest.json: config.{error}") from None
    return {key: field.default for key, field in FIELDS.items()} | settings | known


def check_train_tree(tree: Any) -> None:
    """Raise CheckpointError unless train.pt has all its parts, of the right types."""
    try:
        found = TrainTree.model_validate(tree)
        if found.groups and len(found.groups) != len(found.optimizers):
            raise CheckpointError("train.pt: groups must have as many entries as optimizers")
        for layer in (tree["dopr"] or {}).values():
            LayerNumbers.model_validate(layer)
    except ValidationError as error:
        problems = listed(error, with_values=False)  # the values hold tensors
        raise CheckpointError(f"train.pt: {problems}") from None


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Return the sha256 of a manifest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
