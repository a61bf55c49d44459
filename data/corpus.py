"""Where documents come from: local files, or a dataset streamed from the Hugging Face hub."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data.files import is_reachable
from data.shards import DataError

Document = str | bytes  # bytes are decoded as UTF-8 later, where failures are counted

# Files of rows, with the reader of `datasets`; any other file is one document.
TABLES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents in a fixed order.

    source: what identifies the corpus; goes into meta.json.
    documents: gives the documents from the n-th on, in the same order at every call.
    split_of: split of the n-th document; none: drawn by the hash of its text.
    manifest: description of every file; none: not recorded.
    """

    source: dict[str, Any]
    documents: Callable[[int], Iterator[Document]]
    split_of: Callable[[int], str] | None = None
    manifest: list[dict[str, Any]] | None = None


def local_corpus(path: str | Path, *, column: str = "text") -> Corpus:
    """The files of a folder, in the order of their names, or one file.

    JSON, JSON lines, parquet and CSV hold one document a row, in `column`; any other file is one
    document. Hidden files are left out. Raises DataError if there is nothing at `path`.
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
    """One text, cut in two documents: its last `val_fraction` is for validation.

    Its documents raise DataError if the text is not UTF-8.
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
    """Split "train" of a dataset on the Hugging Face hub, streamed, never stored as a whole.

    Its documents raise DataError in under a second if the hub cannot be reached.
    """

    def documents(start: int) -> Iterator[Document]:
        _require_hub(path)
        return _rows(column, start, path=path, name=subset)

    return Corpus(source={"hub": path, "subset": subset, "column": column}, documents=documents)


def _fingerprint(files: list[Path], root: Path) -> str:
    """Changes when a file is added, removed, renamed or of another size."""
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
    """`column` of the rows from `start` on of a dataset that `datasets` streams."""
    from datasets import load_dataset  # takes a second to import; errors come before it

    rows = load_dataset(split="train", streaming=True, **where)
    for row in rows.skip(start):
        if not isinstance(row.get(column), str):
            raise DataError(
                f"{where}: column {column!r} of a row is {type(row.get(column)).__name__}, "
                f"expected text; columns: {', '.join(row)} (--column names another one)"
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
        f"dataset {path!r} must be streamed from the Hugging Face hub, but {reason}, or give its "
        "parquet files, downloaded elsewhere, with --local FOLDER"
    )
