"""Second-moment sums of a layer's inputs, S = Σ z zᵀ: block-diagonal, over a sample of the tokens.

`gram_` is the torch reference, and the specification of the Triton kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .dispatch import choose_backend


def gram_(
    S: Tensor,  # (blocks, d/blocks, d/blocks), updated in place
    z: Tensor,  # (..., T, d), one row a token
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
    stride: int = 1,
    offset: int | Tensor = 0,
) -> int:  # count
    """S <- β S + α Σ z zᵀ over the sampled tokens, in place; returns how many these are.

    S[k] takes Σ z_k z_kᵀ, z_k the k-th of `blocks` slices of z. The sum is formed in fp32 (float64
    for float64 z), whatever the dtype of z, and exactly symmetric: the upper triangle is a copy of
    the lower one. From S = 0 with α = 1, the covariance Σ is S / count.

    Sequence b gives the tokens (offset + b + j·stride) mod T, j = 0, 1, ...: one in `stride`,
    beginning elsewhere in each sequence, so that a stride that divides T still reaches every
    position. The count, ⌈T / stride⌉ a sequence, is known from the shapes. Advance `offset` from
    one call to the next; as an int64 tensor it changes without a recompilation.

    Raises ValueError if S and z do not fit, or lie on different devices.
    """
    _check_gram(S, z, stride)
    rows = _sample(z.detach(), stride, offset)  # (n, d)
    slices = rows.reshape(len(rows), *S.shape[:2]).transpose(0, 1)  # (blocks, n, d/blocks)
    new = mirror_(_inner_products(slices))
    S.mul_(beta).add_(new.mul_(alpha))  # no fused multiply-add: it would differ across the diagonal
    return len(rows)


@torch.library.custom_op(
    "dopr::accumulate_gram",
    mutates_args=("S", "count", "offset"),
    tags=(torch.Tag.cudagraph_unsafe,),  # a graph would replay what `is_paused` was
)
def accumulate_gram(
    S: Tensor,  # (blocks, d/blocks, d/blocks), updated in place
    count: Tensor,  # (), updated in place
    z: Tensor,  # (..., T, d)
    offset: Tensor,  # () int64, updated in place
    is_paused: Tensor,  # () bool, on the CPU, where reading it waits for nothing
    stride: int,
    backend: str = "auto",  # a `Kernel`; inductor has an argument of its own of the name `kernel`
    rank: int = 0,
    size: int = 1,
) -> None:
    """S += Σ z zᵀ, count += n, offset += sequences; nothing while `is_paused`. See `gram_`.

    Of `size` processes, which take turns with batches of one size, this is number `rank`.
    One opaque operator that torch.compile does not look into, made for the backward of an
    autograd.Function: `is_paused` is read when the backward runs, also where it was compiled.
    """
    if is_paused:
        return
    n_sequences = z.shape[:-2].numel()
    first = offset + rank * n_sequences if rank else offset
    count += _gram_of(backend, S, z)(S, z, beta=1.0, alpha=1.0, stride=stride, offset=first)
    offset += size * n_sequences


@accumulate_gram.register_fake
def _(
    S: Tensor,
    count: Tensor,
    z: Tensor,
    offset: Tensor,
    is_paused: Tensor,
    stride: int,
    backend: str = "auto",
    rank: int = 0,
    size: int = 1,
) -> None:
    return None


def _gram_of(backend: Any, S: Tensor, z: Tensor) -> Callable[..., int]:
    """The `gram_` that `kernel` means for these tensors."""
    row = z.stride(-2) if z.stride(-1) == 1 else z.shape[-1]
    row_bytes = [n * z.element_size() for n in (row, S.shape[-1])]  # of z, and of a slice of it
    if choose_backend(backend, "gram", z, S, row_bytes=row_bytes) == "torch":
        return gram_
    from ._triton_gram import gram_ as triton_gram_

    return triton_gram_


def mirror_(Y: Tensor) -> Tensor:  # (..., d, d), updated in place
    """Copy the lower triangle onto the upper one: exactly symmetric, each element computed once."""
    return Y.tril_().add_(Y.tril(-1).mT)


def _check_gram(S: Tensor, z: Tensor, stride: int) -> None:
    if z.ndim < 2 or not z.is_floating_point():
        raise ValueError(f"gram_: z is {tuple(z.shape)} {z.dtype}; wants a floating (..., T, d)")
    if S.ndim != 3 or S.shape[1] != S.shape[2] or S.shape[0] * S.shape[1] != z.shape[-1]:
        raise ValueError(
            f"gram_: S is {tuple(S.shape)} and z is {tuple(z.shape)}; "
            "wants S (blocks, d/blocks, d/blocks) for z (..., T, d)"
        )
    if S.device != z.device:
        raise ValueError(f"gram_: S is on {S.device} and z on {z.device}; wants one device")
    if stride < 1:
        raise ValueError(f"gram_: stride={stride}; wants at least 1")


def _sample(z: Tensor, stride: int, offset: int | Tensor) -> Tensor:
    """The rows (n, d) of z that count: ⌈T / stride⌉ of each sequence of T."""
    T, d = z.shape[-2:]
    rows = z.reshape(-1, d)  # (B T, d)
    if stride == 1 or len(rows) == 0:
        return rows
    first = torch.arange(len(rows) // T, device=z.device)[:, None]  # (B, 1)
    steps = torch.arange(0, T, stride, device=z.device)  # (⌈T / stride⌉,)
    index = first * T + (first + steps + offset) % T  # (B, ⌈T / stride⌉)
    return rows.index_select(0, index.reshape(-1))


def _inner_products(z: Tensor) -> Tensor:  # (blocks, n, d) -> (blocks, d, d)
    """zᵀ z summed in fp32 or better, under autocast too. Half precision stays on tensor cores."""
    with torch.autocast(z.device.type, enabled=False):
        if z.is_cuda and z.dtype in (torch.bfloat16, torch.float16):
            return torch.bmm(z.mT, z, out_dtype=torch.float32)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return z.mT @ z
