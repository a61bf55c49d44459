"""Shared parts of the Triton kernels: the triangle of tiles, products of tiles, and precisions.

Set TRITON_INTERPRET=1 before this module is imported to run the kernels on CPU tensors.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Precision = Literal["bf16", "bf16x3", "tf32", "tf32x3", "ieee"]

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class TileConfig(NamedTuple):
    """A launch configuration of a kernel."""

    tile: int  # an output tile is (tile, tile)
    depth: int  # number of terms that are summed per iteration
    num_warps: int
    num_stages: int


@triton.jit
def lower_tile(t):
    """Return (i, j) of tile t of a lower triangle, numbered by rows: t = i (i + 1) / 2 + j."""
    i = ((tl.sqrt(8.0 * t + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)  # corrects the rounding
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    return i, t - i * (i + 1) // 2


@triton.jit
def multiply_add(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a b for tiles a (m, k), b (k, n) and acc (m, n) in fp32.

    PRECISION is one of the following:

        bf16     for half-precision factors, which are multiplied without a conversion
        bf16x3   for fp32 factors: split each into a high and a low bf16 part (16 bits in total) and
                 omit the product of the two low parts
        tf32, tf32x3, ieee   for fp32 factors: as in `tl.dot`, 11, about 21 and 24 bits
    """
    if PRECISION == "bf16":
        acc = _dot(a, b, acc, "ieee")
    elif PRECISION == "bf16x3":
        a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
        a_low = (a - a_high.to(tl.float32)).to(tl.bfloat16)
        b_low = (b - b_high.to(tl.float32)).to(tl.bfloat16)
        acc = _dot(a_low, b_high, acc, "ieee")
        acc = _dot(a_high, b_low, acc, "ieee")
        acc = _dot(a_high, b_high, acc, "ieee")
    else:
        acc = _dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # the interpreter multiplies the bit patterns of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


def n_lower_tiles(d: int, tile: int) -> int:
    """Return the number of (tile, tile) tiles that cover the lower triangle of a (d, d) matrix."""
    rows = triton.cdiv(d, tile)
    return rows * (rows + 1) // 2


def scalars(value: float | Tensor, batch: int, like: Tensor) -> Tensor:
    """Return a coefficient, given once or per batch element, as fp32 (batch,) on like's device."""
    if isinstance(value, Tensor):
        return value.to(like.device, torch.float32).expand(batch).contiguous()
    return torch.full((batch,), value, dtype=torch.float32, device=like.device)


def check_runs(name: str, x: Tensor) -> None:
    """Raise ValueError if the kernel `name` cannot run on x."""
    if INTERPRETED.value:
        return
    if not x.is_cuda:
        raise ValueError(f"{name}: the Triton kernel needs tensors on a CUDA GPU, not {x.device}")
    capability = torch.cuda.get_device_capability(x.device)
    if capability < (8, 0):
        major, minor = capability
        raise ValueError(
            f"{name}: needs compute capability 8.0 or more; {x.device} has {major}.{minor}"
        )
