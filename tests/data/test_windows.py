"""Every epoch visits all windows once, in an order that depends on the seed and the epoch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.dataset import DataError
from data.windows import EpochWindows

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=5).map(np.array)


@given(SIZES, st.integers(1, 17), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_has_every_window_once_inside_its_shard(sizes, block_size, seed, epoch):
    if sizes.max() < block_size + 1:
        with pytest.raises(DataError, match=f"at least {block_size + 1}"):
            EpochWindows(sizes, block_size, seed)
        return
    windows = EpochWindows(sizes, block_size, seed)
    shards, starts = windows.locate(np.arange(windows.total) + epoch * windows.total)
    for shard, size in enumerate(sizes):
        in_shard = np.sort(starts[shards == shard])
        assert len(in_shard) == windows.counts[shard]
        assert (np.diff(in_shard) == block_size).all()
        if len(in_shard):
            assert in_shard[0] >= 0
            assert in_shard[-1] + block_size + 1 <= size


def test_the_smallest_usable_shard_has_one_window():
    windows = EpochWindows(np.array([9]), block_size=8, seed=0)
    assert windows.total == 1
    assert [array.tolist() for array in windows.locate(np.arange(2))] == [[0, 0], [0, 0]]


def test_order_and_borders_change_with_epoch_and_seed():
    first = EpochWindows(np.array([1000]), block_size=10, seed=0)
    other = EpochWindows(np.array([1000]), block_size=10, seed=1)
    place = np.arange(first.total)
    draws = [first.locate(place)[1], first.locate(place + first.total)[1], other.locate(place)[1]]
    assert len({tuple(draw) for draw in draws}) == 3
    assert len({int(draw[0] % 10) for draw in draws}) > 1


def test_a_place_does_not_depend_on_what_was_asked_before():
    sizes = np.array([100, 57, 3])
    places = np.arange(200)
    at_once = EpochWindows(sizes, 7, 5).locate(places)
    windows = EpochWindows(sizes, 7, 5)
    for place in np.random.default_rng(0).permutation(places):
        shard, start = windows.locate(np.array([place]))
        assert (shard[0], start[0]) == (at_once[0][place], at_once[1][place])


def test_every_target_is_reached_by_some_epoch():
    windows = EpochWindows(np.array([30]), block_size=7, seed=0)
    starts = windows.locate(np.arange(windows.total * 50))[1]
    targets = (starts[:, None] + np.arange(1, 8)).ravel()
    assert set(targets.tolist()) == set(range(1, 30))
