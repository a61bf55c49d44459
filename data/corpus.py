"""Read documents from local files or from a dataset streamed from the Hugging Face hub."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data.files import is_reachable
from data.shards import DataError

Document = str | bytes  # bytes are decoded as UTF-8 during preparation, which counts failures

# Table formats by suffix, with the name of their reader in `datasets`.
TABLES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents in a fixed order.

    source: facts that identify the corpus; they are written to meta.json.
    documents: function of n that returns the documents from the n-th on, always in the same order.
    split_of: function of n that returns the split of the n-th document. By default the hash of the
        document's text decides.
    manifest: a description of every file, written to manifest.json if given.
    """

    source: dict[str, Any]
    documents: Callable[[int], Iterator[Document]]
    split_of: Callable[[int], str] | None = None
    manifest: list[dict[str, Any]] | None = None


def local_corpus(path: str | Path, *, column: str = "text") -> Corpus:
    """Return the documents in one file, or in all files of a folder in the order of their names.

    JSON, JSON lines, parquet and CSV files hold one document per row, in `column`; any other file
    is one document. Hidden files are skipped. Raises DataError if there is nothing at `path`.
    """
    root = Path(path)
    if not root.exists():
        raise DataError(f"{root}: no such file or folder")
    every = [root] if root.is_file() else sorted(root.rglob("*"))
    files = [file for file in every if file.is_file() and not _is_hidden(file.relative_to(root))]
    if not files:
        raise DataError(f"{root}: holds no files")

    def documents(start: int) -> Iterator[Document]:
        rows = (document for file in files for document in _documents_in(file, column))
        return islice(rows, start, None)

    source = {"local": str(root.resolve()), "files": _fingerprint(files, root), "column": column}
    return Corpus(source=source, documents=documents)


def one_text_corpus(
    source: dict[str, Any], read: Callable[[], bytes], val_fraction: float
) -> Corpus:
    """Return one text as two documents; the last `val_fraction` of it is for validation.

    Reading the documents raises DataError if the text is not UTF-8.
    """

    def documents(start: int) -> Iterator[Document]:
        try:
            text = read().decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{source}: not UTF-8 from byte {error.start} on") from None
        cut = round(len(text) * (1 - val_fraction))
        return islice((text[:cut], text[cut:]), start, None)

    return Corpus(
        source=source, documents=documents, split_of=lambda index: ("train", "val")[index]
    )


def hub_corpus(path: str, *, subset: str | None = None, column: str = "text") -> Corpus:
    """Stream the split "train" of a dataset on the Hugging Face hub without storing it.

    Reading the documents raises DataError in under a second if the hub cannot be reached.
    """

    def documents(start: int) -> Iterator[Document]:
        _require_hub(path)
        return _rows(column, start, path=path, name=subset)

    return Corpus(source={"hub": path, "subset": subset, "column": column}, documents=documents)


def _fingerprint(files: list[Path], root: Path) -> str:
    """Return a hash that changes when a file is added, removed, renamed or changes its size."""
    listing = [f"{file.relative_to(root)} {file.stat().st_size}" for file in files]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()[:16]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _documents_in(file: Path, column: str) -> Iterator[Document]:
    if file.suffix in TABLES:
        yield from _rows(column, 0, path=TABLES[file.suffix], data_files=str(file))
    else:
        yield file.read_bytes()


def _rows(column: str, start: int, **where: Any) -> Iterator[str]:
    """Yield `column` of a dataset's rows from `start` on; `datasets` streams them."""
    from datasets import load_dataset  # takes a second to import

    rows = load_dataset(split="train", streaming=True, **where)
    for row in rows.skip(start):
        if not isinstance(row.get(column), str):
            raise DataError(
                f"{where}: column {column!r} of a row is {type(row.get(column)).__name__}, "
                f"expected text; the columns are: {', '.join(row)} (choose one with --column)"
            )
        yield row[column]


def _require_hub(path: str) -> None:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        reason = "HF_HUB_OFFLINE forbids it; unset that variable"
    elif not is_reachable(endpoint):
        reason = f"{endpoint} does not answer; connect this machine"
    else:
        return
    raise DataError(
        f"dataset {path!r} must be streamed from the Hugging Face hub, but {reason}, or download "
        "its parquet files elsewhere and pass --local FOLDER"
    )
