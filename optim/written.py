"""Which gradients are M already, so that a step without a backward does not precondition again."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Written:
    """The gradients that were replaced by M, each with what it was like then.

    The version of a gradient tells, which all that is added later advances. What is written through
    `.data` does not advance it: the count of captured tokens tells that, in steps that collect.
    """

    def __init__(self) -> None:
        self._seen = WeakTensorKeyDictionary()  # gradient: its version, the tokens captured

    def add(self, gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
        """These (gradient, count) are M now; all of a step at once.

        Gradients that are views of one buffer share a version: it has to be read after the last.
        """
        for grad, count in gradients:
            self._seen[grad] = grad._version, count.clone()

    def is_done(self, grad: Tensor | None, count: Tensor) -> bool:
        """Whether nothing came after M. The host reads `count` only if versions agree: rarely."""
        if grad is None or grad not in self._seen:
            return False
        version, seen = self._seen[grad]
        return grad._version == version and bool(seen == count)

    def nothing_captured(self) -> None:
        """The counts of all layers were set to zero without a step."""
        for _, count in self._seen.values():
            count.zero_()
