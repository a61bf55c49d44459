"""Load batches of token sequences for training and validation.

A training batch is a function of (seed, step). It does not depend on the number of ranks,
micro-batches or worker processes, so a run resumes from its step number alone.
"""

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader

from data.dataset import Dataset, TokenShards
from data.layout import Layout
from data.shards import DataError
from data.windows import EpochWindows

Batch = tuple[torch.Tensor, torch.Tensor]  # x, y: (B, T) int64

_ENDLESS = 2**62  # steps


class TrainSteps(torch.utils.data.Dataset):
    """Dataset whose item `step` is one rank's list of micro-batches for that optimizer step."""

    def __init__(
        self,
        split: TokenShards,
        windows: EpochWindows,
        layout: Layout | None,
        *,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.split = split
        self.windows = windows
        self.layout = layout
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        micro_batches = np.arange(batch_size).reshape(-1, micro_batch_size)
        self.places = micro_batches[
            rank::world_size
        ].flatten()  # this rank's rows of the global batch

    def __getitem__(self, step: int) -> list[Batch] | DataError:
        """Return a DataError instead of raising it: a DataLoader adds a traceback to its text."""
        try:
            return self._micro_batches(step)
        except DataError as error:
            return error

    def _micro_batches(self, step: int) -> list[Batch]:
        shard_ids, starts = self.windows.locate(step * self.batch_size + self.places)
        rows = self.split.rows(shard_ids, starts, self.windows.block_size + 1)
        x, y = rows[:, :-1].copy(), rows[:, 1:].copy()  # (batch_size / world_size, T) each
        y = self.layout.targets(y) if self.layout else y
        size = self.micro_batch_size
        parts = torch.from_numpy(x).split(size), torch.from_numpy(y).split(size)
        return list(zip(*parts, strict=True))


def train_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    micro_batch_size: int,
    block_size: int,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[list[Batch]]:
    """Return an endless iterator over this rank's micro-batches (x, y) of each step.

    x and y are (micro_batch_size, block_size) int64 tensors on the CPU.

    Args:
        batch_size: sequences per step over all ranks. The batch is cut into micro-batches, and rank
            r gets numbers r, r + world_size, ..., so the micro-batches do not depend on the number
            of ranks.
        start_step: the first step.
        workers: number of processes that read ahead.
    Raises:
        ValueError: the sizes are out of range or do not divide.
        DataError: there is too little data, or it is damaged.
    """
    if min(batch_size, micro_batch_size, block_size) < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"batch_size={batch_size}, micro_batch_size={micro_batch_size} and "
            f"block_size={block_size} must be positive, rank={rank} below world_size={world_size}"
        )
    if batch_size % (world_size * micro_batch_size):
        raise ValueError(
            f"batch_size={batch_size} must be divisible by world_size * micro_batch_size = "
            f"{world_size} * {micro_batch_size} = {world_size * micro_batch_size} "
            "(sequences per forward)"
        )
    split = dataset.split("train")
    steps = TrainSteps(
        split,
        EpochWindows(split.sizes, block_size, seed, dataset.layout),
        dataset.layout,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
    )
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(start_step, _ENDLESS),
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=_leave_the_group,
        generator=torch.Generator(),  # keeps the loader from drawing from the global generator
    )
    return map(_raise_error, loader)


def _raise_error(item: list[Batch] | DataError) -> list[Batch]:
    if isinstance(item, DataError):
        raise item
    return item


def _as_is(item: list[Batch] | DataError) -> list[Batch] | DataError:
    return item


def _leave_the_group(_worker: int) -> None:
    """Leave the process group, so that Ctrl-C and SIGTERM reach only the main process."""
    os.setpgid(0, 0)


class ValBatches(Sequence[Batch]):
    """One rank's batches of the validation split; see `val_batches`."""

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        block_size: int,
        limit: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.split, self.layout = dataset.split("val"), dataset.layout
        self.batch_size = batch_size
        self.block_size = block_size
        self.rank, self.world_size = rank, world_size
        if self.layout:
            self.layout.check(block_size)
        stride = self.layout.length if self.layout else block_size
        starts = [np.arange(0, size - 1, stride) for size in self.split.sizes]
        self.starts = np.concatenate(starts)  # (n_windows,)
        self.shard_ids = np.repeat(np.arange(len(starts)), [len(s) for s in starts])
        if len(self.starts) == 0:
            raise DataError("split 'val' has no token with another one before it")
        if 0 < limit < len(self.starts):  # choose evenly spaced windows
            chosen = np.arange(limit) * len(self.starts) // limit
            self.starts, self.shard_ids = self.starts[chosen], self.shard_ids[chosen]

    def __len__(self) -> int:
        return -(-len(self.starts) // (self.batch_size * self.world_size))

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = (index * self.world_size + self.rank) * self.batch_size
        window = slice(first, first + self.batch_size)
        shard_ids, starts = self.shard_ids[window], self.starts[window]
        rows = np.full((self.batch_size, self.block_size + 1), -1)
        rows[: len(starts)] = self.split.rows(shard_ids, starts, self.block_size + 1)
        y = rows[:, 1:].copy()
        x = np.where(y == -1, 0, rows[:, :-1])
        y = self.layout.targets(y) if self.layout else y
        return torch.from_numpy(x), torch.from_numpy(y)


def val_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    block_size: int,
    limit: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> ValBatches:
    """Return this rank's fixed validation batches (x, y), each (batch_size, block_size) int64.

    Rank r gets batches r, r + world_size, ... All ranks have the same number of batches; the last
    ones may hold no targets. y is -1 where no token is scored, and x is 0 after a shard's end.

    Args:
        limit: number of windows, evenly spaced and the same for every batch_size. With 0, every
            token but the first of each shard is a target exactly once.
    """
    if batch_size < 1 or block_size < 1 or limit < 0:
        raise ValueError(
            f"batch_size={batch_size}, block_size={block_size} must be positive, "
            f"limit={limit} must not be negative"
        )
    return ValBatches(dataset, batch_size, block_size, limit, rank, world_size)


def next_step(batches: Iterator[list[Batch]]) -> list[Batch]:
    """Return the micro-batches of the next step. Raises DataError if they cannot be read."""
    try:
        return next(batches)
    except (RuntimeError, EOFError, OSError) as error:  # e.g. a loader process that was killed
        raise DataError(f"the data loader stopped: {error}") from error
