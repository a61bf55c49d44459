"""Read and write token files: llm.c's `.bin` (header, then uint16 ids) and nanoGPT's (no header).

The size of a file is checked when it is opened and again on every access, because reading a
memory-mapped file that has shrunk kills the process without a message.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.files import write_atomic

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4  # int32: magic, version, number of tokens, zeros
TOKEN_BYTES = 2


class DataError(ValueError):
    """The data cannot be used. The message names the file, its content and what was expected."""


class Shard:
    """One token file with `n_tokens` ids. Raises DataError if the file is damaged."""

    def __init__(self, path: str | Path, *, headerless: bool = False) -> None:
        self.path = Path(path)
        self.offset = 0 if headerless else HEADER_BYTES  # bytes before the first token
        size = self._size()
        self.n_tokens = size // TOKEN_BYTES if headerless else _read_header(self.path, size)
        self.n_bytes = self.offset + self.n_tokens * TOKEN_BYTES
        if size != self.n_bytes:
            self._fail(size)
        if self.n_tokens == 0:
            raise DataError(f"{self.path}: holds no tokens ({size} bytes)")
        self._mapped: np.ndarray | None = None

    def tokens(self) -> np.ndarray:
        """Return all ids, (n_tokens,) uint16, mapped read-only.

        Raises DataError if the size of the file has changed.
        """
        size = self._size()
        if size != self.n_bytes:
            self._fail(size)
        if self._mapped is None:
            mapped = np.memmap(self.path, "<u2", "r", self.offset, (self.n_tokens,))
            self._mapped = np.asarray(mapped)
        return self._mapped

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None

    def _fail(self, size: int) -> None:
        raise DataError(
            f"{self.path}: {size:,} bytes, expected {self.n_bytes:,} for {self.n_tokens:,} tokens; "
            "the file is damaged: restore it or prepare the data again"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}  # each process maps the file itself


def _read_header(path: Path, size: int) -> int:
    """Return the number of tokens stated in the header."""
    if size < HEADER_BYTES:
        raise DataError(f"{path}: {size:,} bytes, expected at least {HEADER_BYTES:,} of header")
    magic, version, n_tokens = np.fromfile(path, "<i4", 3).tolist()
    if magic != MAGIC:
        raise DataError(f"{path}: begins with {magic}, expected {MAGIC}: not a token shard")
    if version != VERSION:
        raise DataError(f"{path}: version {version}, expected {VERSION}")
    if n_tokens < 0:
        raise DataError(f"{path}: its header states {n_tokens} tokens")
    return n_tokens


def has_header(path: Path) -> bool:
    """Return whether a file begins like llm.c's shards."""
    return np.fromfile(path, "<i4", 1).tolist() == [MAGIC]


def write_shard(path: Path, documents: Sequence[np.ndarray]) -> dict[str, Any]:
    """Write the concatenated ids of `documents` and return the file's entry for meta.json."""
    n_tokens = sum(map(len, documents))
    if not 0 < n_tokens < 2**31:
        raise DataError(f"{path}: {n_tokens:,} tokens; a shard holds 1 to {2**31 - 1:,}")
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, n_tokens
    chunks = (header, *(document.astype("<u2", copy=False) for document in documents))
    sha256 = write_atomic(path, (chunk.tobytes() for chunk in chunks))
    return shard_entry(path.name, n_tokens, HEADER_BYTES, sha256)


def shard_entry(name: str, n_tokens: int, offset: int, sha256: str) -> dict[str, Any]:
    """Return the entry of a file in meta.json."""
    return {
        "name": name,
        "tokens": n_tokens,
        "bytes": offset + n_tokens * TOKEN_BYTES,
        "header": offset > 0,
        "sha256": sha256,
    }
