"""With a layout, every sequence is one document, and only some of its tokens are targets."""

import json

import numpy as np
import pytest

from data.dataset import Dataset
from data.layout import Layout
from data.loader import train_batches, val_batches
from data.meta import empty_split, write_meta
from data.shards import DataError, write_shard
from data.tokenizer import symbol_tokenizer

LENGTH, N = 5, 12  # document n is n, n + 1, ... modulo 16


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    tokenizer = symbol_tokenizer("counts", [f"c{i}" for i in range(16)])
    tokenizer.save(folder / "tokenizer.json")
    ids = (np.arange(N)[:, None] + np.arange(LENGTH)).astype(np.uint16) % 16  # (N, LENGTH)
    splits = {}
    for name in ("train", "val"):
        entry = write_shard(folder / f"{name}_000000.bin", list(ids))
        splits[name] = empty_split() | {"tokens": ids.size, "documents": N, "files": [entry]}
        splits[name]["text_bytes"] = ids.size
    layout = {"length": LENGTH, "prompt": 2, "unscored": [3]}
    write_meta(folder, {"name": "counts"}, tokenizer, splits, layout=layout)
    return Dataset(folder)


def expected(x):
    """Return the targets of documents whose ids increase by one."""
    y = (x + 1) % 16
    y[:, 0] = -1  # the second token of the prompt
    y[y == 3] = -1
    return y


def test_an_epoch_is_every_document_once_and_whole(documents):
    steps = train_batches(documents, batch_size=4, micro_batch_size=2, block_size=4, seed=0)
    for _ in range(2):  # epochs
        firsts = []
        for _ in range(N // 4):
            for x, y in next(steps):
                assert x.shape == y.shape == (2, LENGTH - 1)
                assert (y == expected(x)).all()
                firsts += x[:, 0].tolist()
        assert sorted(firsts) == list(range(N))


def test_validation_is_every_document_once(documents):
    batches = list(val_batches(documents, batch_size=5, block_size=4))
    x = np.concatenate([x.numpy() for x, _ in batches])
    y = np.concatenate([y.numpy() for _, y in batches])
    assert (x[:N, 0] == np.arange(N)).all()
    assert (y[:N] == expected(x[:N])).all()
    assert (y[N:] == -1).all()  # padding of the last batch


@pytest.mark.parametrize("make", [train_batches, val_batches])
def test_a_sequence_that_is_not_a_document_is_refused_with_the_size_to_use(documents, make):
    sizes = {"batch_size": 4, "block_size": 8}
    if make is train_batches:
        sizes |= {"micro_batch_size": 4, "seed": 0}
    with pytest.raises(DataError, match="use --block_size=4"):
        make(documents, **sizes)


def test_text_has_no_layout(dataset):
    assert Dataset(dataset).layout is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"length": "5"}, r"layout\.length: .*integer .*'5'"),
        ({"length": 7}, "which are no whole documents"),
        ({"prompt": -1}, r"layout\.prompt: .*greater than or equal to 0"),
        ({"prompt": LENGTH}, "leaves no target"),
        ({"unscored": 3}, r"layout\.unscored: "),
        ({"unscored": ["3"]}, r"layout\.unscored\.0: .*integer"),
        ({"unscored": [17]}, "layout.unscored holds ids of 17 and above"),
    ],
)
def test_a_damaged_layout_is_refused(documents, tmp_path, change, problem):
    meta = json.loads((documents.dir / "meta.json").read_text())
    meta["layout"] |= change
    for file in documents.dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match=problem):
        Dataset(tmp_path)


def test_nothing_is_masked_without_a_prompt_or_unscored_ids():
    y = np.arange(6).reshape(2, 3)
    assert (Layout(length=4, prompt=1, unscored=()).targets(y) == y).all()
