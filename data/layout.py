"""Describe data in which all documents have one length: boundaries and targets."""

import numpy as np
from pydantic import NonNegativeInt, model_validator

from data.schema import Schema
from data.shards import DataError


class Layout(Schema):
    """Documents of `length` tokens each, as stored under "layout" in meta.json.

    Every training sequence is then one whole document. The first `prompt` tokens and the ids in
    `unscored`, which the environment emits, are not targets.
    """

    length: NonNegativeInt
    prompt: NonNegativeInt
    unscored: tuple[NonNegativeInt, ...]

    @model_validator(mode="after")
    def _has_targets(self) -> "Layout":
        if self.prompt >= self.length or self.length < 2:
            raise ValueError(f"prompt={self.prompt} leaves no target in {self.length} tokens")
        return self

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
