"""Prepare a dataset: tokenize documents into shards, and write tokenizer.json and meta.json."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data.corpus import Corpus
from data.files import remove_leftovers, sha256_of, user_path
from data.imported_tokenizers import check_tokenizer_name, is_file_of_tokenizer
from data.meta import META, read_meta
from data.preparation import PROGRESS, Preparation, read_progress
from data.shards import DataError

MAX_SHARD_TOKENS = 2**30  # with its last document, a shard has to stay below 2^31
HASHES = ("sha256", "tokenizer_sha256")  # settings that earlier releases did not store
FULL = {
    errno.ENOSPC: "no space is left on the disk; free some",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "it exceeds the limit of file sizes; raise `ulimit -f`",
}


def prepare(
    corpus: Corpus,
    *,
    out: Path,
    tokenizer: str,
    vocab_size: int | None,
    num_proc: int,
    shard_tokens: int,
    val_fraction: float,
    bpe_vocab_size: int = 8192,
) -> None:
    """Write the documents of `corpus` to the folder `out` as a dataset, unless it is there already.

    Args:
        tokenizer: "bpe" and "char" are trained on the corpus; see `named_tokenizer` for the others.
        vocab_size: number of ids of a BPE. Defaults to `bpe_vocab_size`.
        num_proc: number of documents to tokenize in parallel.
        val_fraction: probability that a document goes to the validation split.
    Raises:
        ValueError: a setting is out of range.
        DataError: `out` holds data prepared with other settings, a split would be empty, or the
            disk is full.
    """
    _check_settings(tokenizer, vocab_size, num_proc, shard_tokens, val_fraction)
    settings = {**corpus.source, "tokenizer": tokenizer}
    if is_file_of_tokenizer(tokenizer):
        settings["tokenizer_sha256"] = sha256_of(user_path(tokenizer))
    if tokenizer == "bpe":
        settings["vocab_size"] = vocab_size or bpe_vocab_size
    settings |= {"shard_tokens": shard_tokens, "val_fraction": val_fraction}
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        if _is_prepared(out, settings):
            print(f"{out}: already prepared")
            return
        remove_leftovers(out, "*.bin")
        with _full_disk_explained():
            work = Preparation(corpus, out, settings, num_proc)
            work.write_parts()
            work.finish()


@contextmanager
def _full_disk_explained() -> Iterator[None]:
    """Raise DataError that says what to do if a write fails for want of space."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DataError(
            f"{error.filename}: cannot be written: {FULL[error.errno]}; then run the same command "
            "again, which continues where it stopped"
        ) from None


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of a folder; say so before waiting for another process that holds it."""
    lock = FileLock(out / "prepare.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{out}: waiting for another process that prepares it", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_settings(
    tokenizer: str, vocab_size: int | None, num_proc: int, shard_tokens: int, val_fraction: float
) -> None:
    if vocab_size is not None and tokenizer != "bpe":
        raise ValueError(f"--vocab_size={vocab_size}: only for --tokenizer=bpe, got {tokenizer!r}")
    check_tokenizer_name(tokenizer)
    if num_proc < 1 or shard_tokens < 1:
        raise ValueError(f"num_proc={num_proc}, shard_tokens={shard_tokens}: must be at least 1")
    if shard_tokens > MAX_SHARD_TOKENS:
        raise ValueError(f"shard_tokens={shard_tokens}: must be at most {MAX_SHARD_TOKENS:,}")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}: must be between 0 and 1")


def _is_prepared(out: Path, settings: dict[str, Any]) -> bool:
    """Return whether `out` is a finished dataset. Raises DataError if its settings differ."""
    readers = {META: read_meta, PROGRESS: read_progress}
    for name, read in readers.items():
        if not (out / name).exists():
            continue
        found = read(out).source
        if found != {key: settings[key] for key in settings if key in found or key not in HASHES}:
            raise DataError(
                f"{out}: holds data prepared with other settings\n  there:  {found}\n"
                f"  wanted: {settings}\nDelete the folder or choose another one with --out."
            )
        return name == META
    return False
