"""Batches of token sequences, training and validation, as functions of numbers alone.

Training batches depend on (seed, step) and on nothing else: not on how many ranks, micro-batches
or worker processes share the work. A run continues from its step number.
"""

import signal
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader

from data.dataset import Dataset, TokenShards
from data.shards import DataError
from data.windows import EpochWindows

Batch = tuple[torch.Tensor, torch.Tensor]  # x, y: (B, T) int64

_ENDLESS = 2**62  # steps


class TrainSteps(torch.utils.data.Dataset):
    """Item `step` is one rank's part of that optimizer step: a list of micro-batches."""

    def __init__(
        self,
        split: TokenShards,
        windows: EpochWindows,
        *,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world: int,
    ) -> None:
        self.split = split
        self.windows = windows
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.places = np.arange(batch_size)[rank::world]  # this rank's rows of the global batch

    def __getitem__(self, step: int) -> list[Batch]:
        shard_ids, starts = self.windows.locate(step * self.batch_size + self.places)
        rows = torch.from_numpy(self.split.rows(shard_ids, starts, self.windows.block_size + 1))
        return [
            (micro[:, :-1].contiguous(), micro[:, 1:].contiguous())  # (micro_batch_size, T) each
            for micro in rows.split(self.micro_batch_size)
        ]


def train_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    micro_batch_size: int,
    block_size: int,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[list[Batch]]:
    """For each step from `start_step` on, without end, this rank's micro-batches of (x, y).

    batch_size: sequences per step over all ranks; rank r has rows r, r + world, ... of them.
    workers: processes that read ahead. x, y: (micro_batch_size, block_size) int64 on the CPU.
    Raises ValueError on sizes that do not divide; DataError on too little or damaged data.
    """
    if min(batch_size, micro_batch_size, block_size) < 1 or not 0 <= rank < world:
        raise ValueError(
            f"batch_size={batch_size}, micro_batch_size={micro_batch_size} and "
            f"block_size={block_size} must be positive, rank={rank} below world={world}"
        )
    if batch_size % (world * micro_batch_size):
        raise ValueError(
            f"batch_size={batch_size} must be divisible by world * micro_batch_size = "
            f"{world} * {micro_batch_size} = {world * micro_batch_size} (sequences per forward)"
        )
    split = dataset.split("train")
    steps = TrainSteps(
        split,
        EpochWindows(split.sizes, block_size, seed),
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world=world,
    )
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(start_step, _ENDLESS),
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=_ignore_interrupt,
        generator=torch.Generator(),  # or the loader would draw from the global one
    )
    return iter(loader)


def _as_is(item: list[Batch]) -> list[Batch]:
    return item


def _ignore_interrupt(_worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the main one decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class ValBatches(Sequence[Batch]):
    """The validation split cut into windows, the same for everybody; see `val_batches`."""

    def __init__(self, split: TokenShards, batch_size: int, block_size: int, limit: int) -> None:
        self.split = split
        self.batch_size = batch_size
        self.block_size = block_size
        starts = [np.arange(0, size - 1, block_size) for size in split.sizes]
        self.starts = np.concatenate(starts)  # (n_windows,)
        self.shard_ids = np.repeat(np.arange(len(starts)), [len(s) for s in starts])
        if len(self.starts) == 0:
            raise DataError("split 'val' has no token with another one before it")
        n_batches = -(-len(self.starts) // batch_size)
        n_chosen = min(limit, n_batches) if limit else n_batches
        self.chosen = np.arange(n_chosen) * n_batches // n_chosen  # evenly spread

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Batch:
        first = self.chosen[index] * self.batch_size
        window = slice(first, first + self.batch_size)
        shard_ids, starts = self.shard_ids[window], self.starts[window]
        rows = np.full((self.batch_size, self.block_size + 1), -1)
        rows[: len(starts)] = self.split.rows(shard_ids, starts, self.block_size + 1)
        y = rows[:, 1:].copy()
        x = np.where(y == -1, 0, rows[:, :-1])
        return torch.from_numpy(x), torch.from_numpy(y)


def val_batches(
    dataset: Dataset, *, batch_size: int, block_size: int, limit: int = 0
) -> ValBatches:
    """The fixed validation batches (x, y), each (batch_size, block_size) int64.

    limit=0: all of the split; each token but the first of a shard is a target exactly once.
    limit=n: n of those batches, evenly spread. Where nothing is scored, x is 0 and y is -1.
    """
    if batch_size < 1 or block_size < 1 or limit < 0:
        raise ValueError(
            f"batch_size={batch_size}, block_size={block_size} must be positive, "
            f"limit={limit} not negative"
        )
    return ValBatches(dataset.split("val"), batch_size, block_size, limit)
