"""Tokenize the documents of a corpus into shards, part by part.

Documents are tokenized in parallel and written in order. Every part of about `shard_tokens` tokens
adds one shard to each split and updates `progress.json`, so a preparation that was killed continues
after its last part and ends with the same bytes. meta.json is written last.
"""

import hashlib
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data.corpus import Corpus
from data.imported_tokenizers import named_tokenizer
from data.meta import TOKENIZER, Progress, describe, empty_split, write_json, write_meta
from data.readers import Document, Skipped
from data.schema import read_json
from data.shards import DataError, write_shard
from data.tokenizer import Tokenizer, char_tokenizer, train_bpe

PROGRESS, MANIFEST = "progress.json", "manifest.json"
BPE_SAMPLE = 64 << 20  # characters of training documents on which a BPE is trained
READ_AHEAD = 64  # documents in flight per thread
ENOUGH_DRAWS = 10_000  # different documents read to find a val_fraction that splits them
NAMED_SKIPS = 3  # skipped documents whose place is printed


class Tokens(NamedTuple):
    """The tokens of one document."""

    split: str
    ids: np.ndarray  # (n,) uint16, ends with end-of-text
    text_bytes: int


def read_progress(folder: Path) -> Progress:
    """Read and check progress.json. Raises DataError naming every key at fault."""
    return read_json(folder / PROGRESS, Progress)


class Preparation:
    """A preparation in progress: its tokenizer and the content of progress.json."""

    def __init__(self, corpus: Corpus, out: Path, settings: dict[str, Any], num_proc: int) -> None:
        self.corpus = corpus
        self.out = out
        self.settings = settings
        self.num_proc = num_proc
        if (out / PROGRESS).exists():
            self.progress = read_progress(out).model_dump(mode="json")
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
                "documents_skipped": 0,
                "skipped": {},  # reason -> number of documents
                "splits": {"train": empty_split(), "val": empty_split()},
            }

    def write_parts(self) -> None:
        """Tokenize and write the remaining documents; record progress after each part."""
        with tqdm(desc=str(self.out), unit="B", unit_scale=True, disable=None) as bar:
            documents = self._tokenized(self.progress["documents_read"])
            while any(part := self._next_part(documents, bar)):
                self._write(*part)

    def finish(self) -> None:
        """Write meta.json, print a summary, and remove progress.json. DataError: an empty split."""
        splits = self.progress["splits"]
        for name in splits:
            if not splits[name]["text_bytes"]:
                (self.out / PROGRESS).unlink(missing_ok=True)
                skips = self._skips()
                raise DataError(
                    f"{self.out}: none of {self.progress['documents_read']:,} documents went into "
                    f"split {name!r} with val_fraction={self.settings['val_fraction']}; "
                    f"{self._remedy(name)}{skips and f' ({skips})'}"
                )
        if self.corpus.manifest is not None:
            write_json(self.out / MANIFEST, self.corpus.manifest)
        counts = {name: self.progress[name] for name in ("documents_skipped", "skipped")}
        write_meta(self.out, self.settings, self.tokenizer, splits, **counts)
        (self.out / PROGRESS).unlink(missing_ok=True)
        for name, split in splits.items():
            ratio = split["text_bytes"] / split["tokens"]
            print(
                f"{name}: {split['tokens']:,} tokens, {split['documents']:,} documents, "
                f"{ratio:.3f} bytes per token"
            )
        if skips := self._skips():
            print(skips)

    def _skips(self) -> str:
        """Return the numbers of skipped documents by reason; "" if there are none."""
        listed = [f"{count:,} ({reason})" for reason, count in self.progress["skipped"].items()]
        return f"skipped documents: {', '.join(listed)}" if listed else ""

    def _remedy(self, empty: str) -> str:
        """Say how to prepare the corpus such that split `empty` has documents."""
        if self.corpus.split_of is not None:
            return "use a longer text, or a --val_fraction nearer to 0.5"
        draws: set[float] = set()
        for _, text in self._texts():
            draws.add(_draw(text))
            if len(draws) == ENOUGH_DRAWS:
                break
        if len(draws) < 2:
            return "at least two documents with different texts are needed, because none is cut"
        low, high = sorted(draws)[:2] if empty == "val" else sorted(draws)[-2:]
        places = (round((low + high) / 2, digits) for digits in range(1, 18))
        return f"use more documents or --val_fraction={next(f for f in places if low < f <= high)}"

    def _split_of(self, index: int, text: str) -> str:
        if self.corpus.split_of is not None:
            return self.corpus.split_of(index)
        return "val" if _draw(text) < self.settings["val_fraction"] else "train"

    def _tokenize(self, item: tuple[int, Document]) -> Tokens | Skipped:
        """Tokenize one document, given with its number."""
        text = _checked(*item)
        if isinstance(text, Skipped):
            return text
        ids = np.append(self.tokenizer.encode_array(text), np.uint16(self.tokenizer.eot))
        return Tokens(self._split_of(item[0], text), ids, len(text.encode()))

    def _tokenized(self, start: int) -> Iterator[Tokens | Skipped]:
        """Yield the tokens of every document from `start` on, in order."""
        with ThreadPoolExecutor(self.num_proc) as pool:
            items = enumerate(self.corpus.documents(start), start)
            yield from _map_ahead(pool, self._tokenize, items, READ_AHEAD * self.num_proc)

    def _next_part(
        self, documents: Iterator[Tokens | Skipped], bar: tqdm
    ) -> tuple[list[Tokens], list[Skipped]]:
        """Return the next documents, up to `shard_tokens` tokens in total; none at the end."""
        part: list[Tokens] = []
        skipped: list[Skipped] = []
        tokens = 0
        for document in documents:
            if isinstance(document, Skipped):
                skipped.append(document)
                continue
            part.append(document)
            tokens += len(document.ids)
            bar.update(document.text_bytes)
            if tokens >= self.settings["shard_tokens"]:
                break
        return part, skipped

    def _write(self, part: list[Tokens], skipped: list[Skipped]) -> None:
        """Write the shards of one part, then record the progress."""
        for name, split in self.progress["splits"].items():
            in_split = [document for document in part if document.split == name]
            if not in_split:
                continue
            path = self.out / f"{name}_{len(split['files']):06d}.bin"
            entry = write_shard(path, [document.ids for document in in_split])
            split["files"].append(entry)
            split["tokens"] += entry["tokens"]
            split["documents"] += len(in_split)
            split["text_bytes"] += sum(document.text_bytes for document in in_split)
        for document in skipped[: max(0, NAMED_SKIPS - self.progress["documents_skipped"])]:
            tqdm.write(f"skipped {document}", file=sys.stderr)
        counts = Counter(self.progress["skipped"])
        counts.update(document.reason for document in skipped)
        self.progress["skipped"] = dict(counts)
        self.progress["documents_skipped"] += len(skipped)
        self.progress["documents_read"] += len(part) + len(skipped)
        write_json(self.out / PROGRESS, self.progress)

    def _make_tokenizer(self) -> Tokenizer:
        kind = self.settings["tokenizer"]
        if kind == "bpe":
            return train_bpe(self._bpe_sample(), self.settings["vocab_size"])
        if kind == "char":
            return char_tokenizer("".join(set().union(*(text for _, text in self._texts()))))
        return named_tokenizer(kind)

    def _texts(self) -> Iterator[tuple[int, str]]:
        """Yield the number and the text of every document that is not skipped."""
        for index, document in enumerate(self.corpus.documents(0)):
            text = _checked(index, document)
            if not isinstance(text, Skipped):
                yield index, text

    def _bpe_sample(self) -> Iterator[str]:
        """Yield the first `BPE_SAMPLE` characters of the training documents."""
        left = BPE_SAMPLE
        for index, text in self._texts():
            if self._split_of(index, text) == "train":
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    return


def _draw(text: str) -> float:
    """Return a number from 0 to 1 that depends on `text` alone; below val_fraction it is "val"."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _checked(index: int, document: Document) -> Document:
    """Return the document; skip text with lone surrogates, which UTF-8 cannot express."""
    try:
        if isinstance(document, str):
            document.encode()
        return document
    except UnicodeEncodeError:
        return Skipped(f"document {index + 1:,}", "not UTF-8")


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
