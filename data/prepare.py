"""Prepare a dataset: tokenize documents into shards, and write tokenizer.json and meta.json.

Documents are tokenized in parallel and written in order. Every part of about `shard_tokens` tokens
adds one shard to each split and updates `progress.json`, so a preparation that was killed continues
after its last part and ends with the same bytes. meta.json is written last.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from data.corpus import Corpus, Document
from data.meta import META, TOKENIZER, describe, empty_split, read_json, write_json, write_meta
from data.shards import DataError, write_shard
from data.tokenizer import Tokenizer, char_tokenizer, named_tokenizer, train_bpe

PROGRESS, MANIFEST = "progress.json", "manifest.json"
BPE_SAMPLE = 64 << 20  # characters of training documents on which a BPE is trained
READ_AHEAD = 64  # documents in flight per thread


class Tokens(NamedTuple):
    """The tokens of one document."""

    split: str
    ids: np.ndarray  # (n,) uint16, ends with end-of-text
    text_bytes: int


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
        DataError: `out` holds data prepared with other settings, or a split would be empty.
    """
    _check_settings(tokenizer, vocab_size, num_proc, shard_tokens, val_fraction)
    settings = {**corpus.source, "tokenizer": tokenizer}
    if tokenizer == "bpe":
        settings["vocab_size"] = vocab_size or bpe_vocab_size
    settings |= {"shard_tokens": shard_tokens, "val_fraction": val_fraction}
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / "prepare.lock"):
        if _is_prepared(out, settings):
            print(f"{out}: already prepared")
            return
        for leftover in out.glob("*.bin.*.tmp"):  # an earlier preparation was killed
            leftover.unlink()
        work = _Preparation(corpus, out, settings, num_proc)
        work.write_parts()
        work.finish()


class _Preparation:
    """A preparation in progress: its tokenizer and the content of progress.json."""

    def __init__(self, corpus: Corpus, out: Path, settings: dict[str, Any], num_proc: int) -> None:
        self.corpus = corpus
        self.out = out
        self.settings = settings
        self.num_proc = num_proc
        if (out / PROGRESS).exists():
            self.progress = read_json(out / PROGRESS)
            self.tokenizer = Tokenizer.load(out / TOKENIZER)
            if describe(self.tokenizer) != self.progress["tokenizer"]:
                raise DataError(f"{out}: {TOKENIZER} has changed; delete the folder")
            print(f"{out}: continues after {self.progress['documents_read']:,} documents")
        else:
            self.tokenizer = self._make_tokenizer()
            self.tokenizer.save(out / TOKENIZER)
            self.progress = {
                "source": settings,
                "tokenizer": describe(self.tokenizer),
                "documents_read": 0,
                "documents_skipped": 0,  # not UTF-8
                "splits": {"train": empty_split(), "val": empty_split()},
            }

    def write_parts(self) -> None:
        """Tokenize and write the remaining documents; record progress after each part."""
        with tqdm(desc=str(self.out), unit="B", unit_scale=True, disable=None) as bar:
            documents = self._tokenized(self.progress["documents_read"])
            while part := self._next_part(documents, bar):
                self._write(part)

    def finish(self) -> None:
        """Write meta.json, print a summary, and remove progress.json. DataError: an empty split."""
        splits = self.progress["splits"]
        for name in splits:
            if not splits[name]["tokens"]:
                (self.out / PROGRESS).unlink(missing_ok=True)
                raise DataError(
                    f"{self.out}: none of {self.progress['documents_read']:,} documents went into "
                    f"split {name!r} with val_fraction={self.settings['val_fraction']}; documents "
                    "are not cut: use more of them or another --val_fraction"
                )
        if self.corpus.manifest is not None:
            write_json(self.out / MANIFEST, self.corpus.manifest)
        skipped = self.progress["documents_skipped"]
        write_meta(self.out, self.settings, self.tokenizer, splits, documents_skipped=skipped)
        (self.out / PROGRESS).unlink(missing_ok=True)
        for name, split in splits.items():
            ratio = split["text_bytes"] / split["tokens"]
            print(
                f"{name}: {split['tokens']:,} tokens, {split['documents']:,} documents, "
                f"{ratio:.3f} bytes per token"
            )
        if skipped:
            print(f"{skipped:,} documents are not UTF-8 and were skipped")

    def _split_of(self, index: int, text: str) -> str:
        if self.corpus.split_of is not None:
            return self.corpus.split_of(index)
        draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        return "val" if draw < self.settings["val_fraction"] else "train"

    def _tokenize(self, item: tuple[int, Document]) -> Tokens | None:
        """Tokenize one document; return None if it is not UTF-8."""
        text = _text(item[1])
        if text is None:
            return None
        ids = np.append(self.tokenizer.encode_array(text), np.uint16(self.tokenizer.eot))
        return Tokens(self._split_of(item[0], text), ids, len(text.encode()))

    def _tokenized(self, start: int) -> Iterator[Tokens | None]:
        """Yield the tokens of every document from `start` on, in order."""
        with ThreadPoolExecutor(self.num_proc) as pool:
            items = enumerate(self.corpus.documents(start), start)
            yield from _map_ahead(pool, self._tokenize, items, READ_AHEAD * self.num_proc)

    def _next_part(self, documents: Iterator[Tokens | None], bar: tqdm) -> list[Tokens | None]:
        """Return the next documents, up to `shard_tokens` tokens in total; [] at the end."""
        part: list[Tokens | None] = []
        tokens = 0
        for document in documents:
            part.append(document)
            if document is not None:
                tokens += len(document.ids)
                bar.update(document.text_bytes)
            if tokens >= self.settings["shard_tokens"]:
                break
        return part

    def _write(self, part: list[Tokens | None]) -> None:
        """Write the shards of one part, then record the progress."""
        for name, split in self.progress["splits"].items():
            in_split = [document for document in part if document and document.split == name]
            if not in_split:
                continue
            path = self.out / f"{name}_{len(split['files']):06d}.bin"
            entry = write_shard(path, [document.ids for document in in_split])
            split["files"].append(entry)
            split["tokens"] += entry["tokens"]
            split["documents"] += len(in_split)
            split["text_bytes"] += sum(document.text_bytes for document in in_split)
        self.progress["documents_read"] += len(part)
        self.progress["documents_skipped"] += part.count(None)
        write_json(self.out / PROGRESS, self.progress)

    def _make_tokenizer(self) -> Tokenizer:
        kind = self.settings["tokenizer"]
        if kind == "bpe":
            return train_bpe(self._bpe_sample(), self.settings["vocab_size"])
        if kind == "char":
            texts = filter(None, map(_text, self.corpus.documents(0)))
            return char_tokenizer("".join(set().union(*texts)))
        return named_tokenizer(kind)

    def _bpe_sample(self) -> Iterator[str]:
        """Yield the first `BPE_SAMPLE` characters of the training documents."""
        left = BPE_SAMPLE
        for index, document in enumerate(self.corpus.documents(0)):
            text = _text(document)
            if text is None or self._split_of(index, text) != "train":
                continue
            yield text[:left]
            left -= len(text)
            if left <= 0:
                return


def _text(document: Document) -> str | None:
    """Return the document's text; None if it is not UTF-8."""
    try:
        return document.decode() if isinstance(document, bytes) else document.encode().decode()
    except UnicodeError:
        return None


def _map_ahead(
    pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int
) -> Iterator[Any]:
    """Map a function over items on a pool, in order, with at most `ahead` items in flight."""
    pending: deque = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _check_settings(
    tokenizer: str, vocab_size: int | None, num_proc: int, shard_tokens: int, val_fraction: float
) -> None:
    if vocab_size is not None and tokenizer != "bpe":
        raise ValueError(f"--vocab_size={vocab_size}: only for --tokenizer=bpe, got {tokenizer!r}")
    if num_proc < 1 or shard_tokens < 1:
        raise ValueError(f"num_proc={num_proc}, shard_tokens={shard_tokens}: must be at least 1")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}: must be between 0 and 1")


def _is_prepared(out: Path, settings: dict[str, Any]) -> bool:
    """Return whether `out` is a finished dataset. Raises DataError if its settings differ."""
    for name in (META, PROGRESS):
        if not (out / name).exists():
            continue
        found = read_json(out / name).get("source")
        if found != settings:
            raise DataError(
                f"{out}: holds data prepared with other settings\n  there:  {found}\n"
                f"  wanted: {settings}\nDelete the folder or choose another one with --out."
            )
        return name == META
    return False
