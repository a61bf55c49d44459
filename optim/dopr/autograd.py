"""Autograd functions whose backward captures the input of a layer.

`CapturedLinear` replaces a linear layer. `Tap` passes the output of any other layer through.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .capture import Capture, accumulate


class CapturedLinear(torch.autograd.Function):
    """Compute y = z Wᵀ + b.

    The backward forms the weight gradient in at least fp32 and captures z. It can be differentiated
    again, except for half-precision inputs on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, W: Tensor, b: Tensor | None, capture: Capture) -> Tensor:
        ctx.save_for_backward(z, W if ctx.needs_input_grad[0] else None)  # as F.linear does
        ctx.capture, ctx.W_dtype = capture, W.dtype
        ctx.b_dtype = None if b is None else b.dtype
        return F.linear(z, W.to(z.dtype), None if b is None else b.to(z.dtype))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        z, W = ctx.saved_tensors  # (..., d_in), (d_out, d_in) or None
        accumulate(ctx.capture, z, grad_y)
        rows = grad_y.reshape(-1, grad_y.shape[-1])  # (n, d_out)
        with torch.autocast(z.device.type, enabled=False):  # the caller may have enabled it
            grad_z = None if W is None else grad_y @ W.to(grad_y.dtype)
            G = _matmul_fp32(rows.mT, z.reshape(-1, z.shape[-1])).to(ctx.W_dtype)  # (d_out, d_in)
        grad_b = None
        if ctx.b_dtype is not None:
            grad_b = rows.sum(0, dtype=_at_least_fp32(rows)).to(ctx.b_dtype)
        return grad_z, G, grad_b, None


class Tap(torch.autograd.Function):
    """Return y itself; the backward captures z, the input that y was computed from.

    `geometry` holds the arguments of F.unfold that cut the input of a convolution into patches.
    None captures z itself. Hence `mark_dirty(y)`: a view of y returned from here could not be
    changed in place by the model, and a copy would cost memory.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, z: Tensor, capture: Capture, geometry: tuple[Any, ...] | None
    ) -> Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(z)
        ctx.capture, ctx.geometry = capture, geometry
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (z,) = ctx.saved_tensors
        if ctx.geometry is None:
            accumulate(ctx.capture, z, grad_y)
        elif ctx.capture.is_needed:
            accumulate(ctx.capture, F.unfold(z, *ctx.geometry).mT, grad_y.flatten(-2).mT)
        return grad_y, None, None, None


def _at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _matmul_fp32(A: Tensor, B: Tensor) -> Tensor:
    """Return A @ B in at least fp32. On CUDA, half-precision inputs stay on tensor cores."""
    if A.is_cuda and A.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(A, B, out_dtype=torch.float32)
    dtype = _at_least_fp32(A)
    return A.to(dtype) @ B.to(dtype)
