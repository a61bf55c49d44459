"""Read the documents in one local file: a table with one document per row, or one text.

Files compressed with gzip or zstd are decompressed while they are read. A row without text is
skipped, not an error, so that one bad row does not stop a long preparation.
"""

import csv
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BufferedReader, TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from data.shards import DataError

COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # first bytes -> codec of pyarrow
ENDINGS = (".gz", ".zst")
UNREADABLE = {
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"PK\x03\x04": "zip",
} | {b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)}
END = "\ufffe end of the file"  # a line that no text has, to notice a quote that does not end
FIRST_ROWS = 100  # if none of them has the column, the whole table is refused
BOM = b"\xef\xbb\xbf"  # that some programs write at the beginning of UTF-8 text


@dataclass(frozen=True)
class Skipped:
    """A row or a file without a document; `where` is its place and `reason` what is wrong.

    Skipped documents are counted by `reason`; `detail` is what only this one has.
    """

    where: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}{self.detail and f' ({self.detail})'}"


Document = str | Skipped
Row = tuple[str, Any]  # its place, and a dict from columns to values (NotJSON: a damaged line)


def is_table(path: Path) -> bool:
    """Return whether a file's name says that it holds one document per row."""
    return _ending(path) in _ROWS


def documents_in(path: Path, column: str) -> Iterator[Document]:
    """Yield the text in `column` of every row of a table; any other file is one document.

    Raises DataError if the file is damaged, or if none of its first rows has text in `column`.
    """
    with open_decompressed(path) as stream:
        if is_table(path):
            documents = texts_in(_ROWS[_ending(path)](stream, column), column, str(path))
            yield next(documents, Skipped(str(path), "table without rows"))
            yield from documents
        else:
            yield _with_text(decoded(stream.read(), str(path)), str(path))


class NotJSON(str):
    """What is wrong with a line that is not JSON."""


def read_text(path: Path) -> str:
    """Return a file's text. Raises DataError if it cannot be read, is white space or not UTF-8."""
    with open_decompressed(path) as stream:
        text = _with_text(decoded(stream.read(), str(path)), str(path))
    if isinstance(text, Skipped):
        raise DataError(str(text))
    return text


def decoded(raw: bytes, where: str) -> Document:
    """Return UTF-8 bytes as text."""
    try:
        return raw.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        for magic, name in UNREADABLE.items():
            if raw.startswith(magic):
                read = " and ".join(COMPRESSED.values())
                return Skipped(where, f"compressed with {name}, but only {read} are read")
        return Skipped(f"{where}, byte {error.start}", "not UTF-8")


def _with_text(document: Document, where: str) -> Document:
    """Return the document; skip text that is empty or white space."""
    if isinstance(document, str) and not document.strip():
        return Skipped(where, "empty text")
    return document


def texts_in(rows: Iterable[Row], column: str, name: str) -> Iterator[Document]:
    """Yield the text in `column` of each row.

    Raises DataError if none of the first `FIRST_ROWS` rows has text or null in `column`.
    """
    rows = iter(rows)
    first = list(islice(rows, FIRST_ROWS))
    if first and not any(_fits(row, column) for _, row in first):
        raise _no_such_column(first, column, name)
    for where, row in chain(first, rows):
        where = f"{name}, {where}"
        value = row.get(column) if isinstance(row, dict) else None
        if isinstance(value, bytes):
            yield _with_text(decoded(value, where), where)
        elif isinstance(value, str):
            yield _with_text(value, where)
        elif isinstance(row, NotJSON):
            yield Skipped(where, "not JSON", str(row))
        else:
            yield Skipped(where, f"row without text in column {column!r}")


def _fits(row: Any, column: str) -> bool:
    return isinstance(row, dict) and isinstance(row.get(column, 0), str | bytes | None)


def _no_such_column(first: list[Row], column: str, name: str) -> DataError:
    rows = [row for _, row in first]
    columns = {key: None for row in rows if isinstance(row, dict) for key in row}
    if not columns:
        broken = [
            f"; {place} is not JSON ({row})" for place, row in first if isinstance(row, NotJSON)
        ]
        return DataError(
            f"{name}: expected JSON objects, one per line or in one array"
            f"{''.join(broken[:1])}; if this is no text to train on, leave it out, for example "
            "with --exclude"
        )
    kinds = {type(row[column]).__name__ for row in rows if isinstance(row, dict) and column in row}
    found = f"holds {' and '.join(sorted(kinds))}, not text" if kinds else "does not exist"
    return DataError(
        f"{name}: column {column!r} {found}; its columns are: {', '.join(columns)} "
        "(choose one with --column, or leave the file out, for example with --exclude)"
    )


@contextmanager
def open_decompressed(path: Path) -> Iterator[BufferedReader]:
    """Open a file for reading bytes; decompress it if it begins like gzip or zstd.

    Raises DataError that names the file if opening or reading it fails.
    """
    try:
        with open(path, "rb") as raw:
            start = raw.peek(4)
            codecs = [codec for magic, codec in COMPRESSED.items() if start.startswith(magic)]
            if codecs:
                import pyarrow  # takes a quarter of a second to import

                with BufferedReader(pyarrow.CompressedInputStream(raw, codecs[0])) as stream:
                    yield stream
            else:
                yield raw
    except DataError:
        raise
    except (OSError, ValueError, NotImplementedError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _ending(path: Path) -> str:
    """Return the ending of a file's name in lower case, without that of a compression."""
    name = path.name.lower()
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    return os.path.splitext(name)[1]


def _json_rows(stream: BufferedReader, column: str) -> Iterator[Row]:
    """Yield the objects of an array, or of JSON lines."""
    if stream.peek(4).startswith(BOM):
        stream.read(len(BOM))
    if stream.peek(64).lstrip().startswith(b"["):
        yield from ((f"row {i}", row) for i, row in enumerate(from_json(stream.read()), start=1))
        return
    for number, line in enumerate(stream, start=1):
        if line.strip():
            try:
                row = from_json(line.rstrip())
            except ValueError as error:
                row = NotJSON(str(error).replace(" at line 1 column ", " at column "))
            yield f"line {number}", row


def _separated_rows(delimiter: str, stream: BufferedReader, column: str) -> Iterator[Row]:
    """Yield the rows below the header of a CSV or TSV file; text comes as bytes."""
    csv.field_size_limit(2**31 - 1)
    with TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.reader(chain(text, [END]), delimiter=delimiter)
        header, line = [], 1
        for fields in reader:
            if fields and END in fields[-1] and fields != [END]:
                raise csv.Error(f"the quote in the row of line {line} does not end")
            line = reader.line_num + 1
            if fields == [END]:
                return
            if not header:
                header = fields
                continue
            row: dict[str, Any] = dict(zip(header, fields, strict=False))
            if column in row:
                row[column] = row[column].encode(errors="surrogateescape")
            if fields:
                yield f"line {reader.line_num}", row


def _parquet_rows(stream: BufferedReader, column: str) -> Iterator[Row]:
    """Yield the rows of a parquet file; text comes as bytes, which may not be UTF-8."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(stream)
    known = column in file.schema_arrow.names
    number = 0
    for batch in file.iter_batches(1024, columns=[column] if known else None):
        if known and pa.types.is_dictionary(batch.schema.field(0).type):
            batch = pa.record_batch([batch.column(0).dictionary_decode()], names=[column])
        if known and _is_text(batch.schema.field(0).type):
            batch = pa.record_batch([batch.column(0).cast(pa.large_binary())], names=[column])
        for row in batch.to_pylist():
            number += 1
            yield f"row {number}", row


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


_ROWS = {
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".parquet": _parquet_rows,
    ".csv": partial(_separated_rows, ","),
    ".tsv": partial(_separated_rows, "\t"),
}
