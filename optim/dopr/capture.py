"""Capture a layer's input activations z: its backward adds z zᵀ of the tokens to a running sum S.

Capture runs in the backward pass because that pass sees exactly the tokens that form the weight
gradient, each of them once: in eager mode, under torch.compile and under activation checkpointing.
Evaluation captures nothing. The backward cannot know that a weight gradient will be thrown away
(`torch.autograd.grad` of the inputs, a pass before `zero_grad`): run such a pass inside `paused()`.
A token whose output gradient is exactly zero (padding, a masked prompt) adds nothing to the weight
gradient, so it is not counted. The autograd functions of `autograd.py` call `accumulate`;
`forwards.py` puts them into the forward of a module.
"""

from __future__ import annotations

from types import NoneType
from typing import Any

import torch
from torch import Tensor

from ..kernels.dispatch import Backend
from ..kernels.gram import accumulate_gram
from ..kernels.token_counts import accumulate_token_counts
from .reduction import Reduction, reduce_gram


class Capture:
    """Hold the running sum of one layer's input statistics since the last refresh.

    Args:
        shape: of S: (blocks, d/blocks, d/blocks), or (d,) for a diagonal covariance.
        weight: the layer's weight, which determines the device and the dtype of the sum.
        stride: samples one token in `stride`, starting at `offset` (see kernels/gram.py). Token ids
            are all counted.
        is_paused: () bool on the CPU, shared by all captures of a preconditioner. It is a tensor so
            that the backward reads it at run time. `is_collecting` is a Python bool: torch.compile
            specializes on it.
        has_mean: also sums z itself, in `column_sums`.
        count_masked: also counts tokens whose output gradient is exactly zero.
        backend: implementation of the sum, see kernels/dispatch.py. Token ids always use torch.
        label: name of the layer, for messages.
        padding_idx: the token of an embedding that counts only with `count_masked`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        weight: Tensor,
        stride: int,
        is_paused: Tensor,
        has_mean: bool,
        count_masked: bool,
        backend: Backend,
        label: str,
        padding_idx: int | None,
    ) -> None:
        self.shape = shape
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        # S, the sum of z zᵀ; the layer allocates it. No blocks: another process
        # holds S, or this one freed it until the next sum arrives.
        self.gram = self.no_gram = torch.zeros(0, dtype=self.dtype, device=weight.device)
        self.count = torch.zeros((), dtype=torch.int64, device=weight.device)  # tokens summed
        self.offset = torch.zeros((), dtype=torch.int64, device=weight.device)
        d = shape[0] * shape[-1]
        # (Σ z, number of tokens): row 0 of the current step, row 1 of the tokens in `gram`.
        self.column_sums = self.gram.new_zeros(2, d + 1) if has_mean else None
        self.stride = stride
        self.is_paused = is_paused
        self.count_masked = count_masked
        self.backend = backend
        self.label = label
        self.padding_idx = None if count_masked else padding_idx
        self.rank, self.size = 0, 1  # of this process in the group that trains the layer
        # Tensor-parallel layers only: tp_skips, whether this rank adds nothing; tp_first, the rank
        # whose sequence numbers all ranks use to sample tokens.
        self.tp_skips, self.tp_first = is_paused, 0
        self.tp_rank, self.tp_size = 0, 1
        self.is_collecting = True  # whether the backward passes of this step add to the sum
        self.reduction: Reduction | None = None  # if one process holds S of all processes
        self.owner, self.key = 0, -1  # the rank of that process, and the name of this capture

    @property
    def is_needed(self) -> bool:
        """Whether the backward passes of this step change anything."""
        return self.is_collecting or self.column_sums is not None

    def share_tokens(self, ranks: tuple[int, ...], chosen: int) -> None:
        """Let only process `chosen` count the tokens of this layer, if it is tensor-parallel.

        Args:
            ranks: of the tensor-parallel processes, in the default group; the first of them stands
                for all, so that all sample the same tokens.
        """
        rank = torch.distributed.get_rank()
        self.tp_rank, self.tp_size, self.tp_first = ranks.index(rank), len(ranks), ranks[0]
        self.tp_skips = self.is_paused if rank == chosen else torch.ones_like(self.is_paused)

    def reduce_by(self, reduction: Reduction, owner: int | None) -> None:
        """From now on, add what is seen to S in process `owner`; None: to S in this process.

        With an owner, what was seen before is dropped.
        """
        self.reduction = None
        if owner is not None:
            self.reduction, self.owner, self.key = reduction, owner, reduction.register(self)
            self.clear()

    def _release(self) -> None:
        """Free S. The next sum that arrives allocates it again, in the process that holds it."""
        self.gram = self.gram.new_zeros(0, *self.shape[1:])

    def set_gram(self, S: Tensor) -> None:
        """Set S, in place unless it was freed."""
        if self.reduction:
            self.gram = self.gram.new_empty(S.shape)
        self.gram.copy_(S)

    def finish(self) -> None:
        """Wait until all sums have arrived where they belong."""
        if self.reduction:
            self.reduction.finish()

    def clear(self) -> None:
        """Reset the sums to zero; in place, because compiled code holds them, or by freeing S."""
        self.finish()
        if self.reduction:
            self._release()
        self.gram.zero_()
        self.count.zero_()
        if self.column_sums is not None:
            self.column_sums.zero_()

    @property
    def changing(self) -> list[Tensor]:
        """Everything that a backward changes, S first."""
        tensors = [self.gram, self.count, self.offset]
        return tensors if self.column_sums is None else [*tensors, self.column_sums]

    def sums(self) -> tuple[Tensor, ...]:
        """Return a copy of everything that a backward changes."""
        self.finish()
        return tuple(each.clone() for each in self.changing)

    @torch.no_grad()
    def set_sums(self, sums: tuple[Tensor, ...]) -> None:
        """Set what `sums` returned."""
        self.finish()
        self.set_gram(sums[0])
        for own, value in zip(self.changing[1:], sums[1:], strict=True):
            own.copy_(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return None: a copied model, for example one of averaged weights, must not capture."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return NoneType, ()  # a pickled model does not capture, and loads without this package


@torch.no_grad()
def accumulate(
    capture: Capture,
    z: Tensor,
    grad_y: Tensor | None,
    skips: Tensor | None = None,
    rank: int | None = None,
) -> None:
    """Add the statistics of z to the sums, if this step needs them.

    Args:
        z: activations (..., d), or token ids (...) of an embedding.
        grad_y: (..., d_out), zero where a token is masked: the gradient of the output. None if no
            token is.
        skips: () bool on the CPU, whether to add nothing; by default, while paused.
        rank: the process by whose numbers tokens are sampled; by default, this one.
    """
    if not capture.is_needed:
        return
    skips = capture.is_paused if skips is None else skips
    rank = capture.rank if rank is None else rank
    grad_y = None if capture.count_masked or grad_y is None else grad_y.detach()
    z = z.detach()
    if len(capture.shape) == 1:
        accumulate_token_counts(capture.gram, capture.count, z, skips, grad_y, capture.padding_idx)
        return
    if not capture.is_collecting:
        assert capture.column_sums is not None  # or nothing would be needed
        accumulate_column_sums(capture, z, grad_y, capture.column_sums, skips, rank)
        return
    common = _common(capture, z, grad_y, capture.column_sums, skips, rank)
    if capture.reduction is not None:  # compiled code must not depend on S, which comes and goes
        reduce_gram(capture.key, capture.reduction.ticket, *common)
        return
    if not len(capture.gram):
        raise RuntimeError(
            f"{capture.label}: a backward ran before attach(), which decides what process holds "
            "the statistics: call attach() first, or use statistics='replicated'"
        )
    accumulate_gram(capture.gram, *common)


def accumulate_column_sums(
    capture: Capture, z: Tensor, grad_y: Tensor | None, sums: Tensor, skips: Tensor, rank: int
) -> None:
    """Add z (..., d) and the number of its tokens to row 0 of `sums` (2, d + 1), unless `skips`."""
    accumulate_gram(capture.no_gram, *_common(capture, z, grad_y, sums, skips, rank), True)


def _common(
    capture: Capture,
    z: Tensor,
    grad_y: Tensor | None,
    sums: Tensor | None,
    skips: Tensor,
    rank: int,
) -> tuple[Any, ...]:
    """Return the arguments of `accumulate_gram` and `reduce_gram` after the first."""
    if z.dim() == 1:
        z, grad_y = z[None], grad_y if grad_y is None else grad_y[None]
    settings = capture.stride, capture.backend, rank, capture.size
    return capture.count, z, capture.offset, skips, *settings, grad_y, sums
