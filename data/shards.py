"""Read and write token files of uint16 ids.

They are llm.c's `.bin` (a header, then the ids), nanoGPT's (no header) and numpy's `.npy`.

The size of a file is checked when it is opened and again on every access, because reading a
memory-mapped file that has shrunk kills the process without a message.
"""

import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.files import write_atomic

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4  # int32: magic, version, number of tokens, zeros
TOKEN_BYTES = 2
NPY_MAGIC = b"\x93NUMPY"
# The header of a one-dimensional array of integers; numpy itself evaluates it as Python.
NPY_HEADER = re.compile(
    rb"\{'descr': '([<|][ui][1248])', 'fortran_order': (?:False|True), "
    rb"'shape': \((\d{1,18}),\), ?\} *\n"
)


class DataError(ValueError):
    """The data cannot be used. The message names the file, its content and what was expected."""


class Shard:
    """One token file with `n_tokens` ids. Raises DataError if the file is damaged."""

    def __init__(self, path: str | Path, *, headerless: bool = False) -> None:
        self.path = Path(path)
        size = self._size()
        if headerless:
            self.offset, self.n_tokens = 0, size // TOKEN_BYTES
        else:
            self.offset, self.n_tokens = _read_header(self.path, size)  # bytes, ids
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
            status = self.path.stat()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{self.path}: is not a file")
        return status.st_size

    def _fail(self, size: int) -> None:
        raise DataError(
            f"{self.path}: {size:,} bytes, expected {self.n_bytes:,} for {self.n_tokens:,} tokens; "
            "the file is damaged: restore it or prepare the data again"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}  # each process maps the file itself


def _read_header(path: Path, size: int) -> tuple[int, int]:
    """Return the offset of the first token, in bytes, and the number of tokens in the header."""
    if is_npy(path):
        dtype, n_tokens, offset = read_npy_header(path)
        if dtype != np.dtype("<u2"):
            raise DataError(f"{path}: holds {dtype}, expected uint16")
        return offset, n_tokens
    if size < HEADER_BYTES:
        raise DataError(f"{path}: {size:,} bytes, expected at least {HEADER_BYTES:,} of header")
    magic, version, n_tokens = np.fromfile(path, "<i4", 3).tolist()
    if magic != MAGIC:
        raise DataError(f"{path}: begins with {magic}, expected {MAGIC}: not a token shard")
    if version != VERSION:
        raise DataError(f"{path}: version {version}, expected {VERSION}")
    if n_tokens < 0:
        raise DataError(f"{path}: its header states {n_tokens} tokens")
    return HEADER_BYTES, n_tokens


def is_npy(path: Path) -> bool:
    """Return whether a file begins like an array that numpy saved."""
    return _begins(path, NPY_MAGIC)


def has_header(path: Path) -> bool:
    """Return whether a file begins like llm.c's shards."""
    return _begins(path, np.array([MAGIC], "<i4").tobytes())


def _begins(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def read_npy_header(path: Path) -> tuple[np.dtype, int, int]:
    """Return the type, the number and the offset in bytes of the integers in a `.npy` file.

    Raises DataError if it is not a one-dimensional array of little-endian integers.
    """
    with path.open("rb") as file:
        start = file.read(12)
        major = start[6] if len(start) == 12 else 0
        if major not in (1, 2, 3):
            raise DataError(f"{path}: version {major} of the format .npy, expected 1, 2 or 3")
        first = 10 if major == 1 else 12  # the length of the header has 2 or 4 bytes
        length = int.from_bytes(start[8:first], "little")
        file.seek(first)
        header = file.read(min(length, 10_000))
    found = NPY_HEADER.fullmatch(header)
    if found is None or len(header) != length:
        raise DataError(f"{path}: its header is {header[:80]!r}, expected one row of integers")
    return np.dtype(found[1].decode()), int(found[2]), first + length


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
