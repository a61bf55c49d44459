"""What the Triton kernels share: the triangle of tiles, products of tiles, and their precision.

Under TRITON_INTERPRET=1, set before this module is imported, the kernels run on CPU tensors.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Precision = Literal["bf16", "bf16x3", "tf32", "tf32x3", "ieee"]

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Config(NamedTuple):
    """How a kernel is shipped: tiles (tile, tile), summed `depth` terms at a time."""

    tile: int
    depth: int
    num_warps: int
    num_stages: int


@triton.jit
def lower_tile(t):
    """(i, j) of the t-th tile of a lower triangle, row after row: t = i (i + 1) / 2 + j, i >= j."""
    i = ((tl.sqrt(8.0 * t + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)  # the root was rounded
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    return i, t - i * (i + 1) // 2


@triton.jit
def multiply_add(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b for tiles a (m, k), b (k, n) and acc (m, n) in fp32.

    bf16: half-precision factors as they are. For fp32 factors: bf16x3, each is taken for the sum of
    two bf16 numbers (16 bits) and the product of the two small ones is left out; tf32 (11 bits),
    tf32x3 (about 21) and ieee (24) are those of `tl.dot`.
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
    if INTERPRETED:  # the interpreter would multiply the bit patterns of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


def n_lower_tiles(d: int, tile: int) -> int:
    """How many (tile, tile) tiles cover the lower triangle of a (d, d) matrix."""
    rows = triton.cdiv(d, tile)
    return rows * (rows + 1) // 2


def scalars(value: float | Tensor, batch: int, like: Tensor) -> Tensor:
    """A coefficient, one number or one of each batch element, as fp32 (batch,) on the device."""
    if isinstance(value, Tensor):
        return value.to(like.device, torch.float32).expand(batch).contiguous()
    return torch.full((batch,), value, dtype=torch.float32, device=like.device)


def check_runs(name: str, x: Tensor) -> None:
    """Raises ValueError where the kernel `name` cannot run on x."""
    if INTERPRETED.value:
        return
    if not x.is_cuda:
        raise ValueError(f"{name}: got a tensor on {x.device}; the Triton kernel wants a CUDA GPU")
    capability = torch.cuda.get_device_capability(x.device)
    if capability < (8, 0):
        raise ValueError(f"{name}: {x.device} is of compute capability {capability}; wants >= 8.0")
