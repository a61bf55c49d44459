"""Send each layer's sum of z zᵀ to the process that holds it, as soon as a backward formed it.

So a process needs memory for the sums of the layers that it holds and, for one layer at a time, 2.5
times its Σ: the sum being formed, its temporary, and a packed triangle on its way.
"""

from __future__ import annotations

from itertools import count as counter
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..kernels.gram import accumulate_gram
from ..kernels.operators import check_not_recording, opaque
from ..process_group import Collective
from .triangles import pack, unpack

if TYPE_CHECKING:
    from .capture import Capture

_keys = counter()
_captures: WeakValueDictionary[int, Capture] = WeakValueDictionary()  # for the operator below


class Reduction:
    """Add up the sums of z zᵀ of the processes that share the statistics, one layer at a time.

    All of these processes must run the same backward passes in the same order, as FSDP2 needs, too.

    Attributes:
        digest: of the order in which this process has sent sums, at most 2^31.
    """

    def __init__(self, shards: Collective) -> None:
        self._shards = shards
        self._under_way: tuple[Capture, Tensor, Any] | None = None
        self._first_key: int | None = None
        self.digest = 0
        # Every sum changes it, so that compiled code does not change their order.
        self.ticket = torch.zeros((), dtype=torch.int64, device="cpu")

    def register(self, capture: Capture) -> int:
        """Return a number by which `reduce_gram` finds the capture."""
        key = next(_keys)
        _captures[key] = capture
        self._first_key = key if self._first_key is None else self._first_key
        return key

    def start(self, capture: Capture, S: Tensor) -> None:
        """Start to add S of all processes to the sum of the owner."""
        self.finish()
        assert self._first_key is not None
        self.digest = (self.digest * 31 + capture.key - self._first_key + 1) % 2**31
        packed = pack(S)
        work = self._shards.start_reduce_(packed, capture.owner)
        self._under_way = capture, packed, work

    def finish(self) -> None:
        """Wait for the sum that is on its way."""
        if self._under_way is None:
            return
        (capture, packed, work), self._under_way = self._under_way, None
        self._shards.wait([work])
        if self._shards.rank == capture.owner:
            S = unpack(packed, capture.shape)
            capture.gram = capture.gram.add_(S) if len(capture.gram) else S


@opaque("dopr::reduce_gram", mutates_args=("ticket", "count", "offset", "column_sums"))
def reduce_gram(
    key: int,  # of the capture
    ticket: Tensor,  # of the reduction
    count: Tensor,
    z: Tensor,
    offset: Tensor,
    skips: Tensor,  # whether this process adds nothing; the others may
    stride: int,
    backend: str,
    rank: int,
    size: int,
    grad_y: Tensor | None = None,
    column_sums: Tensor | None = None,
) -> None:
    """Do what `accumulate_gram` does, but add Σ z zᵀ of all processes to the S of the owner.

    Does nothing if the preconditioner was detached.
    """
    check_not_recording(z.device)
    capture = _captures.get(key)
    if capture is None or capture.reduction is None or capture.is_paused:
        return
    ticket += 1
    S = torch.zeros(capture.shape, dtype=capture.dtype, device=z.device)
    common = (stride, backend, rank, size, grad_y, column_sums)
    accumulate_gram(S, count, z, offset, skips, *common)
    capture.reduction.start(capture, S)
