"""Capture the inputs of tensor-parallel layers, whose weights and activations are DTensors.

Over the processes of one mesh dimension, with W (d_out, d_in), as ColwiseParallel and
RowwiseParallel of torch lay them out:

    column-parallel    z whole in every process; rows of W and features of y sharded
    row-parallel       features of z and columns of W sharded; y is a sum over processes

torch computes y and G. Σ is that of the whole z. One of these processes counts a layer's tokens,
and the sums are later added over all processes. The backward of a row-parallel layer gathers z in
steps that collect; a fresh mean needs no message. A token is masked if its output gradient is zero
in all processes. All processes run the same code and gather z, though only one of them counts:
torch.compile fails if they differ.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..process_group import row_bounds
from .capture import Capture, accumulate, accumulate_column_sums


def tensor_parallel_linear(capture: Capture, z: Any, W: Any, b: Any) -> Any:
    """Apply F.linear to DTensors; the backward captures z.

    Raises RuntimeError if z and W have other layouts than those above, or before `attach`.
    """
    _check_layouts(capture.label, z, W)
    if capture.tp_size != W.device_mesh.size():
        raise RuntimeError(f"{capture.label}: call attach() before a forward with gradients")
    return _Tap.apply(F.linear(z, W, b), z.detach(), capture)


def _check_layouts(label: str, z: Any, W: Any) -> None:
    one_mesh = z.device_mesh == W.device_mesh and W.device_mesh.ndim == 1
    of_z, of_W = z.placements[0], W.placements[0]
    is_column_parallel = of_z.is_replicate() and (of_W.is_replicate() or of_W.is_shard(0))
    is_row_parallel = of_z.is_shard(z.dim() - 1) and of_W.is_shard(1)
    if not one_mesh or not (is_column_parallel or is_row_parallel):
        raise RuntimeError(
            f"{label}: its input has the layout {tuple(z.placements)} and its weight "
            f"{tuple(W.placements)}, which is neither column-parallel nor row-parallel over one "
            "mesh dimension: use ColwiseParallel or RowwiseParallel, or pass it to exclude="
        )


class _Tap(torch.autograd.Function):
    """Return y; the backward captures z, the input that y was computed from."""

    @staticmethod
    def forward(ctx: Any, y: Any, z: Any, capture: Capture) -> Any:
        ctx.save_for_backward(z)
        ctx.capture = capture
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Any) -> tuple[Any, None, None]:
        (z,) = ctx.saved_tensors
        if ctx.capture.is_needed:
            _observe(ctx.capture, z, grad_y)
        return grad_y, None, None


@torch.no_grad()
def _observe(capture: Capture, z: Any, grad_y: Any) -> None:
    """Add the statistics of z (..., d_in) to the sums; grad_y (..., d_out) shows masked tokens."""
    is_seen = None if capture.count_masked else _is_nonzero(grad_y)
    if z.placements[0].is_replicate():
        whole = z.to_local()
    elif capture.is_collecting:
        whole = z.full_tensor()
    else:
        _add_column_sums(capture, z, is_seen)
        return
    accumulate(capture, whole, is_seen, capture.tp_skips, capture.tp_first)


def _is_nonzero(grad_y: Any) -> Tensor:  # (..., 1) uint8
    """Return which tokens have an output gradient other than zero, in any process."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    features_are_sharded = grad_y.placements[0].is_shard(grad_y.dim() - 1)
    if not features_are_sharded:
        grad_y = grad_y.redistribute(placements=[Replicate()])
    is_nonzero = (grad_y.to_local() != 0).any(-1, keepdim=True).to(torch.uint8)
    if not features_are_sharded:
        return is_nonzero
    return DTensor.from_local(is_nonzero, grad_y.device_mesh, [Partial("max")]).full_tensor()


def _add_column_sums(capture: Capture, z: Any, is_seen: Tensor | None) -> None:
    """Add the local features of z, and a share of the token count, to the sums of this step."""
    z_here, sums = z.to_local(), capture.column_sums
    assert sums is not None
    own = sums.new_zeros(2, z_here.shape[-1] + 1)
    accumulate_column_sums(capture, z_here, is_seen, own, capture.is_paused, capture.tp_first)
    first = row_bounds(z.shape[-1], capture.tp_size)[capture.tp_rank]
    sums[0, first : first + z_here.shape[-1]] += own[0, :-1]
    sums[0, -1] += own[0, -1] / capture.tp_size
