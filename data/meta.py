"""Read, check and write meta.json, which describes a folder of prepared tokens."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data.files import write_atomic
from data.shards import DataError
from data.tokenizer import MAX_VOCAB, Tokenizer

META, TOKENIZER = "meta.json", "tokenizer.json"
FORMAT = 1
SPLITS = ("train", "val")

# The keys of meta.json that are checked, with their types.
_SCHEMA = {"format": int, "source": dict, "tokenizer": dict, "splits": dict, "created_with": dict}
_TOKENIZER = {"name": str, "sha256": str, "n_vocab": int}
_SPLIT = {"files": list, "tokens": int, "documents": int, "text_bytes": int}
_LAYOUT = {"length": int, "prompt": int, "unscored": list}  # optional, see data/layout.py
_FILE = {"name": str, "tokens": int, "bytes": int, "header": bool, "sha256": str}


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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises DataError if the file cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, expected an object")
    return content


def read_meta(folder: Path) -> dict[str, Any]:
    """Read and check meta.json.

    Raises DataError naming the key that is missing or has the wrong type.
    """
    path = folder / META
    meta = read_json(path)
    _check(path, "", meta, _SCHEMA)
    if meta["format"] != FORMAT:
        raise DataError(f"{path}: has format {meta['format']}, expected {FORMAT}; prepare it again")
    _check(path, "tokenizer.", meta["tokenizer"], _TOKENIZER)
    if not 2 <= meta["tokenizer"]["n_vocab"] <= MAX_VOCAB:
        raise DataError(
            f"{path}: n_vocab is {meta['tokenizer']['n_vocab']}, expected 2 to {MAX_VOCAB}, "
            "because ids are stored as uint16"
        )
    if "layout" in meta:
        _check(path, "layout.", meta["layout"], _LAYOUT)
    for name in SPLITS:
        split = meta["splits"].get(name)
        _check(path, f"splits.{name}.", split, _SPLIT)
        for index, file in enumerate(split["files"]):
            _check(path, f"splits.{name}.files[{index}].", file, _FILE)
    return meta


def _check(path: Path, where: str, content: Any, schema: dict[str, type]) -> None:
    """Raise DataError unless `content` has every key of `schema` with its type."""
    if not isinstance(content, dict):
        raise DataError(f"{path}: {where.rstrip('.')} is missing or not an object")
    for key, kind in schema.items():
        if type(content.get(key)) is not kind:
            raise DataError(
                f"{path}: {where}{key} is {content.get(key)!r}, expected {kind.__name__}"
            )


def _with_ratio(split: Mapping[str, Any]) -> dict[str, Any]:
    ratio = round(split["text_bytes"] / split["tokens"], 4)
    return {**split, "bytes_per_token": ratio}


def _versions() -> dict[str, str]:
    packages = ("numpy", "tiktoken", "rustbpe", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
