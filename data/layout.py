"""Describe data in which all documents have one length: boundaries and targets."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from data.shards import DataError


@dataclass(frozen=True)
class Layout:
    """Documents of `length` tokens each, as stored under "layout" in meta.json.

    Every training sequence is then one whole document. The first `prompt` tokens and the ids in
    `unscored`, which the environment emits, are not targets.
    """

    length: int
    prompt: int
    unscored: tuple[int, ...]

    @staticmethod
    def of(meta: dict[str, Any]) -> "Layout | None":
        """Return the layout in the content of meta.json; None if the data is one stream of text."""
        entry = meta.get("layout")
        return entry and Layout(entry["length"], entry["prompt"], tuple(entry["unscored"]))

    def check(self, block_size: int) -> None:
        """Raise DataError unless a sequence of `block_size` inputs is exactly one document."""
        if block_size != self.length - 1:
            raise DataError(
                f"block_size={block_size}, but every document of this dataset has {self.length} "
                f"tokens and is one sequence; use --block_size={self.length - 1}"
            )

    def targets(self, y: np.ndarray) -> np.ndarray:  # (B, length - 1) -> (B, length - 1)
        """Return y with -1 at tokens that are not targets; y[:, j] is token j + 1 of a document."""
        given = np.arange(1, y.shape[1] + 1) < self.prompt
        return np.where(given | np.isin(y, self.unscored), -1, y)
