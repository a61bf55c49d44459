"""Documents -> token shards, tokenizer.json and meta.json: the work that every dataset shares.

Documents are tokenised side by side and written in order, part by part; each part ends at a
document and adds one shard to each split. `progress.json` is updated after a part, so a killed
preparation continues behind its last part and ends with the same bytes. meta.json comes last.
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
BPE_SAMPLE = 64 << 20  # characters of training documents from which a BPE is learnt
READ_AHEAD = 64  # documents in flight per thread


class Tokens(NamedTuple):
    """One document, tokenised."""

    split: str
    ids: np.ndarray  # (n,) uint16, end-of-text last
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
    """Make `out` a dataset of the documents in `corpus`, unless it already is.

    tokenizer: "bpe" and "char" are learnt from the corpus, see `named_tokenizer` for the others.
    vocab_size: ids of a BPE; none: bpe_vocab_size. num_proc: documents tokenised side by side.
    Raises ValueError on bad settings, DataError if `out` holds something else or a split is empty.
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
        work = _Preparation(corpus, out, settings, num_proc)
        work.write_parts()
        work.finish()


class _Preparation:
    """A preparation under way: the tokenizer, and what progress.json records."""

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
        """Write all that is left of the corpus, recording progress after each part."""
        with tqdm(desc=str(self.out), unit="B", unit_scale=True, disable=None) as bar:
            documents = self._tokenised(self.progress["documents_read"])
            while part := self._next_part(documents, bar):
                self._write(part)

    def finish(self) -> None:
        """Write meta.json. DataError if a split got nothing; then the preparation is undone."""
        splits = self.progress["splits"]
        for name in splits:
            if not splits[name]["tokens"]:
                (self.out / PROGRESS).unlink(missing_ok=True)
                raise DataError(
                    f"{self.out}: none of {self.progress['documents_read']:,} documents went into "
                    f"split {name!r} with val_fraction={self.settings['val_fraction']}; whole "
                    "documents are drawn: use more of them or another --val_fraction"
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
            print(f"{skipped:,} documents are not UTF-8 and were left out")

    def _split_of(self, index: int, text: str) -> str:
        if self.corpus.split_of is not None:
            return self.corpus.split_of(index)
        draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        return "val" if draw < self.settings["val_fraction"] else "train"

    def _tokenise(self, item: tuple[int, Document]) -> Tokens | None:
        """One document; none if it is not UTF-8."""
        text = _text(item[1])
        if text is None:
            return None
        ids = np.append(self.tokenizer.encode_array(text), np.uint16(self.tokenizer.eot))
        return Tokens(self._split_of(item[0], text), ids, len(text.encode()))

    def _tokenised(self, start: int) -> Iterator[Tokens | None]:
        """All documents from `start` on, in order, `num_proc` of them at a time."""
        with ThreadPoolExecutor(self.num_proc) as pool:
            items = enumerate(self.corpus.documents(start), start)
            yield from _map_ahead(pool, self._tokenise, items, READ_AHEAD * self.num_proc)

    def _next_part(self, documents: Iterator[Tokens | None], bar: tqdm) -> list[Tokens | None]:
        """Documents with `shard_tokens` tokens in all, or what is left of them."""
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
        """Write one part's shards, then the progress that counts them."""
        for name, split in self.progress["splits"].items():
            mine = [document for document in part if document and document.split == name]
            if not mine:
                continue
            path = self.out / f"{name}_{len(split['files']):06d}.bin"
            entry = write_shard(path, [document.ids for document in mine])
            split["files"].append(entry)
            split["tokens"] += entry["tokens"]
            split["documents"] += len(mine)
            split["text_bytes"] += sum(document.text_bytes for document in mine)
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
        """The first documents of split train."""
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
    """The document's text; none if it is not UTF-8."""
    try:
        return document.decode() if isinstance(document, bytes) else document.encode().decode()
    except UnicodeError:
        return None


def _map_ahead(
    pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int
) -> Iterator[Any]:
    """`map` on a pool, in order, with at most `ahead` items in flight."""
    flying: deque = deque()
    for item in items:
        flying.append(pool.submit(function, item))
        if len(flying) >= ahead:
            yield flying.popleft().result()
    while flying:
        yield flying.popleft().result()


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
    """Whether `out` is finished. DataError if it was begun with other settings."""
    for name in (META, PROGRESS):
        if not (out / name).exists():
            continue
        found = read_json(out / name).get("source")
        if found != settings:
            raise DataError(
                f"{out}: holds data prepared with other settings\n  there:  {found}\n"
                f"  wanted: {settings}\nDelete the folder or write elsewhere with --out."
            )
        return name == META
    return False
