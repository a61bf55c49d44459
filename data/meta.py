"""Read, check and write meta.json, which describes a folder of prepared tokens."""

import json
import platform
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from data.files import write_atomic
from data.layout import Layout
from data.schema import Schema, read_json
from data.shards import DataError
from data.tokenizer import MAX_VOCAB, Tokenizer

META, TOKENIZER = "meta.json", "tokenizer.json"
FORMAT = 1
SPLITS = ("train", "val")


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or {"\\", "\0"} & {*name}:
        raise ValueError("is not the name of a file in this folder")
    return name


def _current(number: int) -> int:
    if number != FORMAT:
        raise ValueError(f"expected {FORMAT}; prepare the data again")
    return number


Count = Annotated[int, Field(ge=0, lt=2**62)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class TokenizerEntry(Schema):
    """The facts that identify a tokenizer. Ids are stored as uint16."""

    name: str
    sha256: Sha256
    n_vocab: Annotated[int, Field(ge=2, le=MAX_VOCAB)]


class ShardEntry(Schema):
    """One token file; `name` is its path below the folder, with "/" between the parts."""

    name: Annotated[str, AfterValidator(_inside)]
    tokens: Annotated[Count, Field(ge=1)]
    bytes: Count
    header: bool
    sha256: Sha256


class SplitEntry(Schema):
    """The files of one split, and what they hold in total."""

    tokens: Count
    documents: Count
    text_bytes: Count
    files: list[ShardEntry]
    bytes_per_token: float | None = None

    @model_validator(mode="after")
    def _adds_up(self) -> "SplitEntry":
        found = sum(file.tokens for file in self.files)
        if found != self.tokens:
            raise ValueError(f"states {self.tokens:,} tokens, but its files hold {found:,}")
        return self


class Splits(Schema):
    """The splits of a dataset. Raises ValueError if two entries are the same file."""

    train: SplitEntry
    val: SplitEntry

    @model_validator(mode="after")
    def _has_each_file_once(self) -> "Splits":
        names = Counter(PurePosixPath(file.name) for file in self.train.files + self.val.files)
        if twice := [str(name) for name, n in names.items() if n > 1]:
            raise ValueError(f"lists files twice: {', '.join(twice)}")
        return self


class Meta(Schema):
    """The content of meta.json."""

    format: Annotated[int, AfterValidator(_current)]
    source: dict[str, Any]
    tokenizer: TokenizerEntry
    splits: Splits
    layout: Layout | None = None  # None: the data is one stream of text
    documents_skipped: Count = 0
    skipped: dict[str, Count] = Field(default={})  # reason -> number of documents
    created_with: dict[str, str]

    @model_validator(mode="after")
    def _layout_fits(self) -> "Meta":
        if self.layout is None:
            return self
        for file in self.splits.train.files + self.splits.val.files:
            if file.tokens % self.layout.length:
                raise ValueError(
                    f"{file.name} has {file.tokens} tokens, which are no whole documents of "
                    f"layout.length={self.layout.length} tokens"
                )
        if max(self.layout.unscored, default=0) >= self.tokenizer.n_vocab:
            raise ValueError(f"layout.unscored holds ids of {self.tokenizer.n_vocab} and above")
        return self


class Progress(Schema):
    """The content of progress.json, which describes a preparation that is not finished."""

    source: dict[str, Any]
    tokenizer: TokenizerEntry
    documents_read: Count
    documents_skipped: Count
    skipped: dict[str, Count] = Field(default={})
    splits: Splits


def empty_split() -> dict[str, Any]:
    """Return the meta.json entry of a split without tokens."""
    return {"tokens": 0, "documents": 0, "text_bytes": 0, "files": []}


def write_meta(
    folder: Path, source: Mapping[str, Any], tokenizer: Tokenizer, splits: Mapping[str, Any], **more
) -> None:
    """Write meta.json, which makes `folder` a dataset.

    Raises DataError if a split holds no tokens.
    """
    for name in SPLITS:
        if not splits[name]["tokens"]:
            raise DataError(f"{folder}: split {name!r} holds no tokens")
    meta = {
        "format": FORMAT,
        "source": dict(source),
        "tokenizer": describe(tokenizer),
        "splits": {name: _with_ratio(splits[name]) for name in SPLITS},
        **more,
        "created_with": _versions(),
    }
    write_json(folder / META, meta)


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the facts that identify a tokenizer."""
    return {"name": tokenizer.name, "sha256": tokenizer.sha256, "n_vocab": tokenizer.n_vocab}


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def read_meta(folder: Path) -> Meta:
    """Read and check meta.json.

    Raises DataError naming every key that is missing, unknown or has a wrong value.
    """
    return read_json(folder / META, Meta)


def _with_ratio(split: Mapping[str, Any]) -> dict[str, Any]:
    ratio = round(split["text_bytes"] / split["tokens"], 4)
    return {**split, "bytes_per_token": ratio}


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in ("numpy", "tiktoken", "rustbpe", "datasets"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
