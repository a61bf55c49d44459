"""Collect documents from local files."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

from data.files import files_under, printable, user_path
from data.readers import Document, documents_in
from data.shards import DataError


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


def local_corpus(
    path: str | Path,
    *,
    column: str = "text",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    out: Path | None = None,
) -> Corpus:
    """Return the documents in one file, or in all files of a folder in the order of their names.

    JSON, JSON lines, parquet, CSV and TSV files hold one document per row, in `column`; any other
    file is one document. Hidden files are skipped.

    Args:
        include: patterns such as "*.py"; only files that match one of them are read. A pattern is
            compared with the path below `path` and with each of its parts.
        exclude: patterns of the files and folders that are not read.
        out: folder of the prepared data, which is not read if it is below `path`.
    Raises:
        DataError: there is nothing to read at `path`, or it is the same folder as `out`.
    """
    root = user_path(path)
    if not root.exists():
        raise DataError(f"{root}: no such file or folder")
    if out is not None and out.resolve() == root.resolve():
        raise DataError(f"{root}: is the folder of the prepared data, too; choose another --out")
    files = [root] if root.is_file() else _chosen(root, include, exclude, out)
    if not files:
        patterns = f" that match include={include}, exclude={exclude}" if include or exclude else ""
        raise DataError(f"{root}: holds no files{patterns}")

    def documents(start: int) -> Iterator[Document]:
        rows = (row for file in files for row in documents_in(file, column))
        return islice(rows, start, None)

    source = {"local": printable(root), "files": _fingerprint(files, root), "column": column}
    patterns = {"include": list(include), "exclude": list(exclude)}
    source |= {name: given for name, given in patterns.items() if given}
    return Corpus(source=source, documents=documents)


def one_text_corpus(source: dict[str, Any], read: Callable[[], str], val_fraction: float) -> Corpus:
    """Return one text as two documents; the last `val_fraction` of it is for validation."""

    def documents(start: int) -> Iterator[Document]:
        text = read()
        cut = round(len(text) * (1 - val_fraction))
        return islice((text[:cut], text[cut:]), start, None)

    return Corpus(
        source=source, documents=documents, split_of=lambda index: ("train", "val")[index]
    )


def _chosen(
    root: Path, include: Sequence[str], exclude: Sequence[str], out: Path | None
) -> list[Path]:
    """Return the files below `root` that are to be read."""
    base = root.resolve()
    own = out.resolve() if out else None
    own = own.relative_to(base) if own and base in own.parents else None
    chosen = []
    for file in files_under(root):
        name = file.relative_to(root)
        wanted = not include or _matches(name, include)
        if wanted and not _matches(name, exclude) and not (own and name.is_relative_to(own)):
            chosen.append(file)
    return chosen


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    names = (path.as_posix(), *path.parts)
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _fingerprint(files: list[Path], root: Path) -> str:
    """Return a hash that changes when a file is added, removed, renamed or changes its size."""
    listing = [f"{file.relative_to(root)} {file.stat().st_size}" for file in files]
    return hashlib.sha256(os.fsencode("\n".join(listing))).hexdigest()[:16]
