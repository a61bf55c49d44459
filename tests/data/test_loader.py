"""Batches depend only on seed and step, and validation scores every token once."""

import itertools
import multiprocessing
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.dataset import DataError, open_dataset
from data.loader import train_batches, val_batches
from data.shards import write_shard

T = 8


@pytest.fixture
def dataset(tmp_path, write_counting):
    return open_dataset(write_counting(tmp_path / "set", train=(300, 210, 5), val=(50,)))


def steps(dataset, n, **changes):
    """Return the first n steps of one rank, each as a list of micro-batches."""
    arguments = dict(batch_size=8, micro_batch_size=8, block_size=T, seed=3)
    return list(itertools.islice(train_batches(dataset, **{**arguments, **changes}), n))


def global_batch(ranks):
    """Assemble one step, (batch_size, 2T), from the micro-batches of all ranks."""
    # micro-batch i of rank r is number i * world_size + r of the global batch
    micro_batches = [each for turn in zip(*ranks, strict=True) for each in turn]
    return torch.cat([torch.cat(pair, dim=1) for pair in micro_batches])


@pytest.mark.parametrize(("world_size", "micro"), [(1, 4), (1, 1), (2, 4), (2, 2), (4, 1), (8, 1)])
def test_the_stream_is_the_same_for_any_world_and_micro_batch(dataset, world_size, micro):
    n = 12  # more than an epoch of 7.5 steps
    reference = [global_batch([micros]) for micros in steps(dataset, n)]
    ranks = [
        steps(dataset, n, micro_batch_size=micro, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for expected, parts in zip(reference, zip(*ranks, strict=True), strict=True):
        assert all(x.shape == y.shape == (micro, T) for part in parts for x, y in part)
        assert torch.equal(global_batch(parts), expected)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_stream_is_the_same_for_any_number_of_workers(dataset, workers):
    expected = [global_batch([micros]) for micros in steps(dataset, 12)]
    found = [global_batch([m]) for m in steps(dataset, 12, workers=workers, micro_batch_size=4)]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("start", [1, 6, 7, 8, 11])
def test_a_stream_resumed_at_a_step_equals_the_uninterrupted_one(dataset, start):
    expected = [global_batch([micros]) for micros in steps(dataset, 20)][start:]
    found = [global_batch([m]) for m in steps(dataset, 20 - start, start_step=start)]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_rows_are_consecutive_tokens_of_one_shard_and_targets_the_next_ones(dataset):
    ends = dataset.split("train").sizes.cumsum()
    for [(x, y)] in steps(dataset, 20):
        assert x.dtype == y.dtype == torch.int64
        assert x.is_contiguous()
        assert y.is_contiguous()
        assert torch.equal(y, x + 1)  # every id is its position
        assert torch.equal(x, x[:, :1] + torch.arange(T))
        shard = np.searchsorted(ends, torch.stack([x[:, 0], y[:, -1]]).numpy(), side="right")
        assert (shard[0] == shard[1]).all()


def test_an_epoch_scores_no_token_twice(dataset):
    n_windows = (300 - 1) // T - 1 + (210 - 1) // T - 1
    targets = [
        [y for _, y in m] for m in steps(dataset, 2, batch_size=n_windows, micro_batch_size=1)
    ]
    for epoch in targets:
        tokens = torch.cat(epoch)
        assert tokens.unique().numel() == tokens.numel() == n_windows * T


def test_seeds_differ(dataset):
    assert not torch.equal(*(global_batch(steps(dataset, 1, seed=seed)) for seed in (0, 1)))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_random_state_is_left_alone(dataset, workers):
    before = torch.get_rng_state()
    steps(dataset, 3, workers=workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_that_does_not_divide_is_refused(dataset):
    with pytest.raises(ValueError, match=r"batch_size=8 must be divisible .* 3 \* 2 = 6"):
        steps(dataset, 1, micro_batch_size=2, world_size=3)


@pytest.mark.parametrize("change", [{"block_size": 0}, {"micro_batch_size": 0}, {"rank": 1}])
def test_sizes_out_of_range_are_refused(dataset, change):
    with pytest.raises(ValueError, match="must be positive"):
        steps(dataset, 1, **change)


def test_data_shorter_than_a_block_is_refused_before_the_first_step(dataset):
    arguments = dict(batch_size=1, micro_batch_size=1, seed=0)
    with pytest.raises(DataError, match="300 tokens, but block_size=300 needs at least 301"):
        train_batches(dataset, block_size=300, **arguments)
    train_batches(dataset, block_size=299, **arguments)


def test_a_token_outside_the_vocabulary_is_named(dataset):
    path = dataset.dir / "train_000001.bin"
    write_shard(path, [np.r_[np.arange(99), 1025, np.arange(110)].astype(np.uint16)])
    with pytest.raises(DataError, match=r"train_000001\.bin: token 99 is 1025, .* below 1025"):
        steps(dataset, 20)


@pytest.mark.parametrize(("fault", "workers"), [("vanishes", 0), ("shrinks", 0), ("shrinks", 1)])
def test_a_shard_lost_during_the_run_is_named(dataset, fault, workers):
    stream = train_batches(
        dataset, batch_size=8, micro_batch_size=8, block_size=T, seed=0, workers=workers
    )
    next(stream)
    path = dataset.dir / "train_000000.bin"
    if fault == "vanishes":
        path.unlink()
    else:
        os.truncate(path, 1024)
    with pytest.raises(DataError, match=r"train_000000\.bin") as caught:
        list(itertools.islice(stream, 20))
    assert "Traceback" not in str(caught.value)


def test_signals_to_the_trainers_group_do_not_reach_its_workers(dataset):
    others = multiprocessing.active_children()  # left by other tests
    stream = train_batches(
        dataset, batch_size=8, micro_batch_size=8, block_size=T, seed=0, workers=1
    )
    next(stream)
    (worker,) = set(multiprocessing.active_children()) - {*others}
    assert os.getpgid(worker.pid) != os.getpgid(0)
    assert len(list(itertools.islice(stream, 20))) == 20


def scored(batches):
    """Return all scored inputs and targets."""
    pairs = [(x[y != -1], y[y != -1]) for x, y in batches]
    return (torch.cat(side).tolist() for side in zip(*pairs, strict=True))


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4).filter(lambda s: max(s) > 1),
    batch_size=st.integers(1, 5),
    block_size=st.integers(1, 17),
)
def test_validation_scores_each_token_once(
    tmp_path_factory, write_counting, sizes, batch_size, block_size
):
    dataset = open_dataset(write_counting(tmp_path_factory.mktemp("set"), val=sizes))
    batches = val_batches(dataset, batch_size=batch_size, block_size=block_size)
    first = set(np.cumsum([0, *sizes]).tolist())
    inputs, targets = scored(batches)
    assert targets == [token for token in range(sum(sizes)) if token not in first]
    assert inputs == [token - 1 for token in targets]
    for x, y in batches:
        assert x.shape == y.shape == (batch_size, block_size)
        assert x.dtype == y.dtype == torch.int64
        assert (x[y == -1] == 0).all()


def test_limited_validation_is_fixed_and_evenly_spread(tmp_path, write_counting):
    dataset = open_dataset(write_counting(tmp_path, val=(801,)))
    every = val_batches(dataset, batch_size=2, block_size=T)
    windows = torch.cat([x for x, _ in every])  # (100, T)
    for batch_size in (1, 2, 5):  # the windows do not depend on the batch size
        some = val_batches(dataset, batch_size=batch_size, block_size=T, limit=10)
        assert len(some) == 10 // batch_size
        assert torch.equal(torch.cat([x for x, _ in some]), windows[::10])
    assert len(val_batches(dataset, batch_size=2, block_size=T, limit=101)) == 50


def test_validation_refuses_what_it_cannot_score(tmp_path, write_counting):
    dataset = open_dataset(write_counting(tmp_path, val=(1, 1)))
    with pytest.raises(DataError, match="'val' has no token with another"):
        val_batches(dataset, batch_size=1, block_size=T)
    with pytest.raises(ValueError, match="limit=-1 must not be negative"):
        val_batches(dataset, batch_size=1, block_size=T, limit=-1)
