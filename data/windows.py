"""Compute the position of the n-th training sequence as a function of the seed and n.

Every epoch cuts each shard into windows that do not overlap, starting at a new random offset, and
visits all windows once in a new random order. If all documents have one length (data.layout), the
windows are the documents, without an offset.
"""

import numpy as np

from data.layout import Layout
from data.shards import DataError


class EpochWindows:
    """Windows of `block_size` + 1 tokens in shards of `sizes` tokens, shuffled in every epoch."""

    def __init__(
        self, sizes: np.ndarray, block_size: int, seed: int, layout: Layout | None = None
    ) -> None:
        if layout:
            layout.check(block_size)
            self.stride = layout.length  # tokens from one window to the next
            self.counts = sizes // layout.length  # (n_shards,)
        else:
            self.stride = block_size  # a window's last target is the next window's first input
            fitting = (sizes - 1) // block_size  # (n_shards,)
            # One window fewer than fit leaves room for any offset; a single window is kept.
            self.counts = np.maximum(fitting - 1, np.minimum(fitting, 1))
        self.total = int(self.counts.sum())
        if self.total == 0:
            raise DataError(
                f"the largest shard of split 'train' has {sizes.max():,} tokens, but "
                f"block_size={block_size} needs at least {block_size + 1:,}"
            )
        self.block_size = block_size
        self.seed = seed
        self._ends = np.cumsum(self.counts)
        used = self.counts * self.stride + (0 if layout else 1)
        self._spare = np.maximum(sizes - used, 0)  # largest offset
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return shard and first token, (n,) each, of the sequences with these global indices."""
        epochs, positions = np.divmod(indices, self.total)
        shard_ids, starts = np.empty_like(indices), np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            offsets, order = self._epoch(epoch)
            in_epoch = epochs == epoch
            window = order[positions[in_epoch]]
            shard = np.searchsorted(self._ends, window, side="right")
            within = window - (self._ends - self.counts)[shard]
            shard_ids[in_epoch] = shard
            starts[in_epoch] = offsets[shard] + within * self.stride
        return shard_ids, starts

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the offset of each shard, (n_shards,), and the order of all windows, (total,)."""
        if epoch not in self._epochs:
            random = np.random.Generator(
                np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
            )
            drawn = random.integers(0, self._spare + 1), random.permutation(self.total)
            previous = {e: kept for e, kept in self._epochs.items() if e == epoch - 1}
            self._epochs = {**previous, epoch: drawn}
        return self._epochs[epoch]
