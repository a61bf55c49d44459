"""Open and check a prepared dataset: a folder with meta.json, tokenizer.json and shards."""

import difflib
from pathlib import Path
from typing import Any

import numpy as np

import data.pystdlib.prepare
from data.files import user_path
from data.meta import META, SPLITS, TOKENIZER, ShardEntry, describe, read_meta
from data.shards import DataError, Shard
from data.tokenizer import Tokenizer

__all__ = ["DataError", "Dataset", "TokenShards", "known_datasets", "open_dataset"]

DATA = Path(__file__).parent


class TokenShards:
    """The tokens of one split, stored in `shards`. Every id must be below `n_vocab`."""

    def __init__(self, shards: list[Shard], n_vocab: int) -> None:
        self.shards = shards
        self.n_vocab = n_vocab
        self.sizes = np.array([shard.n_tokens for shard in shards])  # (n_shards,) tokens
        self.n_tokens = int(self.sizes.sum())

    def rows(self, shard_ids: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        """Return `length` ids from each start, (len(starts), length) int64; -1 after a shard's end.

        Args:
            shard_ids: index of the shard of each row, (n,).
            starts: position of each row's first token in its shard, (n,).
        Raises:
            DataError: a file has vanished or changed size, or an id is not below `n_vocab`.
        """
        tokens = {shard: self.shards[shard].tokens() for shard in set(shard_ids.tolist())}
        rows = np.full((len(starts), length), -1, dtype=np.int64)
        for row, shard, start in zip(rows, shard_ids.tolist(), starts.tolist(), strict=True):
            piece = tokens[shard][start : start + length]
            row[: len(piece)] = piece
        if rows.max(initial=0) >= self.n_vocab:
            self._fail(rows, shard_ids, starts)
        return rows

    def _fail(self, rows: np.ndarray, shard_ids: np.ndarray, starts: np.ndarray) -> None:
        row, column = np.argwhere(rows >= self.n_vocab)[0]
        raise DataError(
            f"{self.shards[shard_ids[row]].path}: token {starts[row] + column} is "
            f"{rows[row, column]}, but the tokenizer has only ids below {self.n_vocab}"
        )


class Dataset:
    """A folder of prepared tokens.

    Raises DataError if meta.json, the tokenizer and the shards are incomplete or contradict each
    other. The content of the shards is not read; see data.verify.
    """

    def __init__(self, folder: str | Path) -> None:
        self.dir = user_path(folder)
        meta = read_meta(self.dir)
        self.meta: dict[str, Any] = meta.model_dump(mode="json", exclude_unset=True)
        self.layout = meta.layout  # None if the data is one stream of text
        self.tokenizer = self._load_tokenizer()
        self._splits = {name: self._open(name, getattr(meta.splits, name).files) for name in SPLITS}

    def split(self, name: str) -> TokenShards:
        """Return the tokens of "train" or "val"."""
        return self._splits[name]

    def _load_tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.load(self.dir / TOKENIZER)
        if describe(tokenizer) != self.meta["tokenizer"]:
            raise DataError(
                f"{self.dir / TOKENIZER}: is {describe(tokenizer)}, but {META} says that the "
                f"shards were written with {self.meta['tokenizer']}"
            )
        return tokenizer

    def _open(self, split: str, entries: list[ShardEntry]) -> TokenShards:
        if not entries:
            raise DataError(f"{self.dir / META}: split {split!r} is empty")
        return TokenShards([*map(self._open_shard, entries)], self.tokenizer.n_vocab)

    def _open_shard(self, entry: ShardEntry) -> Shard:
        shard = Shard(self.dir / entry.name, headerless=not entry.header)
        if (shard.n_tokens, shard.n_bytes) != (entry.tokens, entry.bytes):
            raise DataError(
                f"{shard.path}: {shard.n_bytes:,} bytes with {shard.n_tokens:,} tokens, but {META} "
                f"says {entry.bytes:,} bytes with {entry.tokens:,} tokens"
            )
        return shard


def known_datasets() -> list[str]:
    """Return the names of the datasets that have a `prepare` module."""
    return sorted(path.parent.name for path in DATA.glob("*/prepare.py"))


def open_dataset(name_or_path: str | Path) -> Dataset:
    """Open a known dataset, prepared in data/<name>/prepared, or a folder with meta.json.

    Prepares `pystdlib` if necessary. Raises DataError, with the command to run, if there is no such
    data. "~" in a path is expanded.
    """
    name = str(name_or_path)
    if name in known_datasets():
        return _open_known(name)
    try:
        folder = user_path(name)
        is_prepared = (folder / META).exists()
    except (ValueError, OSError) as error:
        raise DataError(f"dataset {name!r}: {error}") from None
    if is_prepared:
        return Dataset(folder)
    if folder.is_dir():
        raise DataError(
            f"{folder}: has no {META}; for shards made elsewhere, write it with "
            f"`python -m data.adopt {folder} --tokenizer gpt2`"
        )
    close = difflib.get_close_matches(name, known_datasets(), n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise DataError(
        f"dataset {name!r}: neither a folder nor one of {', '.join(known_datasets())}{hint}"
        "; the name of a task is task:NAME"
    )


def _open_known(name: str) -> Dataset:
    folder = DATA / name / "prepared"
    if name == "pystdlib" and not (folder / META).exists():
        data.pystdlib.prepare.main([])
    if not (folder / META).exists():
        raise DataError(f"dataset {name!r} is not prepared; run `python -m data.{name}.prepare`")
    return Dataset(folder)
