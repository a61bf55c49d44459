"""Data that is made of documents of one length: where they begin, and which tokens are targets."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from data.shards import DataError


@dataclass(frozen=True)
class Layout:
    """Every document has `length` tokens; meta.json says so under "layout".

    A sequence is then a whole document, never parts of two. Its first `prompt` tokens are given,
    and the ids in `unscored` are somebody else's part: neither is a target.
    """

    length: int
    prompt: int
    unscored: tuple[int, ...]

    @staticmethod
    def of(meta: dict[str, Any]) -> "Layout | None":
        """What meta.json says; None for text, which is one stream."""
        entry = meta.get("layout")
        return entry and Layout(entry["length"], entry["prompt"], tuple(entry["unscored"]))

    def check(self, block_size: int) -> None:
        """DataError unless a sequence of the run is exactly one document."""
        if block_size != self.length - 1:
            raise DataError(
                f"block_size={block_size}, but this dataset is made of documents of {self.length} "
                f"tokens, one a sequence; use --block_size={self.length - 1}"
            )

    def targets(self, y: np.ndarray) -> np.ndarray:  # (B, length - 1) -> the same
        """y with -1 where nothing is scored; y[:, j] is token j + 1 of its document."""
        given = np.arange(1, y.shape[1] + 1) < self.prompt
        return np.where(given | np.isin(y, self.unscored), -1, y)
