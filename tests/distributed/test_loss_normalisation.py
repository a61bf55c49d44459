"""The loss of a step is a sum over its scored tokens divided by their number in the whole step."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from data.meta import empty_split, write_meta
from data.shards import write_shard
from data.tokenizer import byte_tokenizer
from model import GPT, IGNORE
from tests.distributed.runs import PARALLEL, SETTINGS, distance, trained
from tests.tiny import argv, metrics

pytestmark = pytest.mark.xdist_group("gang")  # the tests share a gang of processes

LENGTH = 17  # tokens of a document
TOLERANCE = 1e-5  # of fp32 sums in another order; the weights are about 0.02


SGD = {"block_size": LENGTH - 1, "optimizer": "sgd", "lr": 0.1}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """A dataset of documents that differ in their number of scored tokens, from none to all."""
    folder = tmp_path_factory.mktemp("documents") / "data"
    folder.mkdir()
    tokenizer = byte_tokenizer()
    tokenizer.save(folder / "tokenizer.json")
    random = np.random.default_rng(0)
    shares = random.random((96, 1))  # of scored tokens in each document
    is_scored = random.random((96, LENGTH)) < shares
    tokens = np.where(is_scored, random.integers(100, 120, is_scored.shape), 7).astype(np.uint16)
    splits = {}
    for name in ("train", "val"):
        entry = write_shard(folder / f"{name}_000000.bin", list(tokens))
        sizes = {"tokens": tokens.size, "documents": len(tokens), "text_bytes": tokens.size}
        splits[name] = empty_split() | sizes | {"files": [entry]}
    layout = {"length": LENGTH, "prompt": 1, "unscored": [7]}
    write_meta(folder, {"name": "documents"}, tokenizer, splits, layout=layout)
    return folder


@pytest.fixture(scope="module")
def reference(documents, tmp_path_factory):
    """A run in one process whose micro-batch is the whole batch."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    return trained(None, 1, documents, folder, micro_batch_size=12, **SGD)


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_the_micro_batch_size_changes_nothing(documents, tmp_path, reference, micro_batch_size):
    out = trained(None, 1, documents, tmp_path, micro_batch_size=micro_batch_size, **SGD)
    assert distance(out, reference) < TOLERANCE
    losses = [row["loss"] for row in metrics(reference, "train")]
    assert [row["loss"] for row in metrics(out, "train")] == pytest.approx(losses, abs=TOLERANCE)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_the_number_of_processes_changes_nothing(gang, documents, tmp_path, reference, parallel):
    size, how = PARALLEL[parallel]
    out = trained(gang, size, documents, tmp_path / "run", micro_batch_size=2, **SGD, **how)
    assert distance(out, reference) < TOLERANCE
    losses = [row["loss"] for row in metrics(reference, "train")]
    assert [row["loss"] for row in metrics(out, "train")] == pytest.approx(losses, abs=TOLERANCE)


def test_a_micro_batch_without_a_scored_token_counts_nothing(dataset, tmp_path, monkeypatch):
    read = train.next_step

    def with_an_empty_micro_batch(batches):
        (x, y), *rest = read(batches)
        return [(x, y.masked_fill(y == y, IGNORE)), *rest]

    monkeypatch.setattr(train, "next_step", with_an_empty_micro_batch)
    settings = SETTINGS | {"micro_batch_size": 6, "max_steps": 3, "warmup_steps": 1}
    assert train.main(argv(dataset, tmp_path / "run", **settings)) == 0
    rows = metrics(tmp_path / "run", "train")
    assert all(row["skipped"] == 0 for row in rows)
    assert rows[0]["loss"] == pytest.approx(torch.log(torch.tensor(257.0)).item(), rel=0.05)


def test_the_logged_loss_is_the_mean_over_the_scored_tokens_of_the_batch(
    documents, tmp_path, monkeypatch
):
    seen = []
    forward = GPT.forward

    def recorded(self, idx, targets=None, **options):
        if self.training:
            with torch.no_grad():
                logits, _ = forward(self, idx)
            rows, labels = logits.double().flatten(0, 1), targets.flatten()
            nats = F.cross_entropy(rows, labels, ignore_index=IGNORE, reduction="sum")
            seen.append((nats, (targets != IGNORE).sum()))
        return forward(self, idx, targets, **options)

    monkeypatch.setattr(GPT, "forward", recorded)
    out = trained(None, 1, documents, tmp_path, micro_batch_size=3, **SGD | {"max_steps": 2})
    for i, row in enumerate(metrics(out, "train")):
        nats, counts = zip(*seen[4 * i : 4 * i + 4], strict=True)
        assert row["loss"] == pytest.approx((sum(nats) / sum(counts)).item(), rel=1e-5)
