"""Damaged files are read as what they were, or refused by name; there is no third outcome."""

import csv
import gzip
import io
import json
import pickle
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.adopt import adopt
from data.corpus import Corpus
from data.dataset import Dataset
from data.imported_tokenizers import named_tokenizer
from data.loader import val_batches
from data.meta import META, TOKENIZER, describe, empty_split, write_json, write_meta
from data.preparation import PROGRESS
from data.prepare import prepare
from data.readers import documents_in
from data.shards import Shard, write_shard
from data.tokenizer import Tokenizer, byte_tokenizer, symbol_tokenizer
from tests.data.mutations import Raw, damaged, damaged_bytes
from tests.data.test_imported_tokenizers import library_tokenizer
from tests.tiny import write_dataset

TEXT = "def f(x):\n    return x + 12345  # é"
# Examples of each format.
EXAMPLES = [pytest.param(20, id="few"), pytest.param(1000, id="many", marks=pytest.mark.slow)]


def outcome(read: Callable[[Any], Any], argument: Any) -> tuple[Any, str]:
    """Return what a function returns, and the message of its ValueError."""
    try:
        return read(argument), ""
    except ValueError as error:
        return None, str(error)


class Format(NamedTuple):
    """A file format: how to write a file and how to read it.

    write: function of a folder that returns the path of a file in it.
    read: function of this path that returns what the file means, or None if that may change.
    mutate: function of the file's bytes that returns a strategy of damaged bytes.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]
    mutate: Callable[[bytes], st.SearchStrategy[bytes]] = damaged


def text_dataset(folder: Path) -> Path:
    return write_dataset(folder / "set", train_tokens=400) / META


def layout_dataset(folder: Path) -> Path:
    tokenizer = symbol_tokenizer("counts", [f"c{i}" for i in range(16)])
    tokenizer.save(folder / TOKENIZER)
    ids = (np.arange(12)[:, None] + np.arange(5)).astype(np.uint16) % 16
    splits = {name: empty_split() | {"tokens": 60, "text_bytes": 60} for name in ("train", "val")}
    for name, split in splits.items():
        split["files"] = [write_shard(folder / f"{name}.bin", list(ids))]
    layout = {"length": 5, "prompt": 2, "unscored": [3]}
    write_meta(folder, {"name": "counts"}, tokenizer, splits, layout=layout)
    return folder / META


def read_dataset(path: Path) -> Any:
    """Return the tokens of the dataset that holds `path`."""
    dataset = Dataset(path.parent)
    length = dataset.layout.length - 1 if dataset.layout else 16
    for _ in val_batches(dataset, batch_size=4, block_size=length):
        pass
    shards = [shard for name in ("train", "val") for shard in dataset.split(name).shards]
    return dataset.tokenizer.sha256, [shard.tokens().tolist() for shard in shards]


def saved_tokenizer(folder: Path) -> Path:
    return text_dataset(folder).parent / TOKENIZER


def library_dataset(folder: Path) -> Path:
    """Write a dataset whose tokenizer is in the format of the library `tokenizers`."""
    path = saved_tokenizer(folder)
    path.write_text(library_tokenizer().to_str(), encoding="utf-8")
    meta = json.loads((path.parent / META).read_bytes())
    meta["tokenizer"] = describe(Tokenizer.load(path))
    write_json(path.parent / META, meta)
    return path


def read_tokenizer(path: Path) -> Any:
    tokenizer = Tokenizer.load(path)
    ids, refusal = outcome(tokenizer.encode, TEXT)
    assert repr(tokenizer.name) in refusal if refusal else tokenizer.decode(ids) == TEXT
    return read_dataset(path)


def nanogpt_meta(folder: Path) -> Path:
    itos = dict(enumerate("\n abcé"))
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder / "meta.pkl"


def read_nanogpt(path: Path) -> None:
    tokenizer = named_tokenizer(str(path))
    assert tokenizer.n_vocab == len(tokenizer.ranks) + 1


DOCUMENTS = [f"document {i} " * 3 for i in range(200)]


def unfinished(folder: Path) -> Path:
    """Write a preparation that stopped after 150 of the 200 documents."""

    def documents(start: int) -> Iterator[str]:
        yield from islice(DOCUMENTS, start, 150)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        continue_preparation(folder / PROGRESS, documents)
    return folder / PROGRESS


def continue_preparation(path: Path, documents: Callable | None = None) -> None:
    corpus = Corpus(
        source={"name": "numbers"},
        documents=documents or (lambda start: islice(DOCUMENTS, start, None)),
        split_of=lambda index: ("train", "val")[index % 2],
    )
    prepare(
        corpus,
        out=path.parent,
        tokenizer="byte",
        vocab_size=None,
        num_proc=1,
        shard_tokens=2000,
        val_fraction=0.5,
    )
    assert Dataset(path.parent).split("train").n_tokens
    (path.parent / META).unlink()


def shard(folder: Path) -> Path:
    write_shard(folder / "train.bin", [np.arange(300, dtype=np.uint16)])
    return folder / "train.bin"


def array(folder: Path) -> Path:
    for name in ("val.npy", "train.npy"):
        np.save(folder / name, np.arange(250, dtype=np.uint16))
    return folder / "train.npy"


def wide_array(folder: Path) -> Path:
    for name in ("val.npy", "train.npy"):
        np.save(folder / name, np.arange(250, dtype=np.uint32))
    return folder / "train.npy"


def read_shard(path: Path) -> list[int]:
    return Shard(path).tokens().tolist()


def adopted(path: Path) -> list[int]:
    adopt(path.parent, byte_tokenizer())
    tokens = Dataset(path.parent).split("train").shards[0].tokens().tolist()
    (path.parent / META).unlink()
    return tokens


def header(raw: bytes) -> st.SearchStrategy[bytes]:
    return damaged_bytes(raw, end=128)


def table(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        rows = [{"id": i, "text": text} for i, text in enumerate(DOCUMENTS)]
        path = folder / name
        if "parquet" in name:
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            text = io.StringIO(newline="")
            if "csv" in name:
                csv.writer(text).writerows([("id", "text"), *(row.values() for row in rows)])
            else:
                text.write("".join(json.dumps(row) + "\n" for row in rows))
            raw = text.getvalue().encode()
            path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
        return path

    return write


def read_table(path: Path) -> None:
    list(documents_in(path, "text"))


FORMATS = {
    "meta of text": Format(text_dataset, read_dataset),
    "meta of documents": Format(layout_dataset, read_dataset),
    "tokenizer": Format(saved_tokenizer, read_tokenizer),
    "library tokenizer": Format(library_dataset, read_tokenizer),
    "nanoGPT's meta": Format(nanogpt_meta, read_nanogpt, damaged_bytes),
    "progress": Format(unfinished, continue_preparation),
    "shard": Format(shard, read_shard, header),
    "array": Format(array, adopted, header),
    "wide array": Format(wide_array, adopted, header),
    "JSON lines": Format(table("a.jsonl"), read_table, damaged_bytes),
    "compressed CSV": Format(table("a.csv.gz"), read_table, damaged_bytes),
    "parquet": Format(table("a.parquet"), read_table, damaged_bytes),
}


@pytest.mark.parametrize("n_examples", EXAMPLES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_as_before_or_refused_by_name(name, n_examples, tmp_path):
    path = FORMATS[name].write(tmp_path)
    raw = Raw(path.read_bytes())
    files = {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
    before = FORMATS[name].read(path)

    @settings(max_examples=n_examples, deadline=None, database=None, derandomize=n_examples < 100)
    @given(FORMATS[name].mutate(raw))
    def check(mutated: bytes) -> None:
        for file in set(path.parent.iterdir()) - files.keys():
            file.unlink()
        for file, content in (files | {path: mutated}).items():
            file.write_bytes(content)
        after, refusal = outcome(FORMATS[name].read, path)
        assert str(path.parent) in refusal if refusal else after == before

    check()
