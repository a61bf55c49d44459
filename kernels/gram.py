"""Second-moment sums of a layer's inputs, S = Σ z zᵀ: block-diagonal, over a sample of the tokens.

This is the torch reference, and the specification of any faster implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gram(
    z: Tensor,  # (..., d), one row a token
    *,
    blocks: int = 1,
    stride: int = 1,
    offset: int | Tensor = 0,
    sequence_length: int | None = None,
) -> tuple[Tensor, int]:  # S (blocks, d/blocks, d/blocks), count
    """Sum z zᵀ over the sampled tokens and count them: S[k] = Σ z_k z_kᵀ, z_k the k-th slice of z.

    S is fp32 (float64 for float64 z), whatever the dtype of z, and exactly symmetric: the upper
    triangle is a copy of the lower one. Σ is S / count.

    Sequence b gives the tokens (offset + b + j·stride) mod T, j = 0, 1, ...: one in `stride`,
    beginning elsewhere in each sequence, so that a stride that divides T still reaches every
    position. The count, ⌈T / stride⌉ a sequence, is known from the shapes. Advance `offset` from
    one call to the next; as an int64 tensor it changes without a recompilation.

    Args:
        sequence_length: T in tokens. By default the last dimension but one of z.

    Raises ValueError if d is not a multiple of `blocks`, or the tokens not one of T.
    """
    _check_gram(z, blocks, stride)
    rows = _sample(z.detach(), stride, offset, sequence_length)  # (n, d)
    n, d = rows.shape
    slices = rows.reshape(n, blocks, d // blocks).transpose(0, 1)  # (blocks, n, d/blocks)
    return mirror(_inner_products(slices)), n


def gram_(
    S: Tensor,  # (blocks, d/blocks, d/blocks), updated in place
    z: Tensor,  # (..., d)
    *,
    beta: float | Tensor,
    alpha: float | Tensor,
    stride: int = 1,
    offset: int | Tensor = 0,
    sequence_length: int | None = None,
) -> int:
    """S <- β S + α Σ z zᵀ, in place; returns the count. The blocks are those of S; else see `gram`.

    `beta` and `alpha` are numbers or scalar tensors, which change without a recompilation.
    """
    if S.ndim != 3 or S.shape[1] != S.shape[2] or S.shape[0] * S.shape[1] != z.shape[-1]:
        raise ValueError(
            f"gram_: S is {tuple(S.shape)} and z is {tuple(z.shape)}; "
            "wants S (blocks, d/blocks, d/blocks) for z (..., d)"
        )
    new, n = gram(
        z, blocks=S.shape[0], stride=stride, offset=offset, sequence_length=sequence_length
    )
    S.mul_(beta).add_(new.mul_(alpha))  # no fused multiply-add: it would differ across the diagonal
    return n


@torch.library.custom_op("dopr::accumulate_gram", mutates_args=("S", "count", "offset"))
def accumulate_gram(
    S: Tensor,  # (blocks, d/blocks, d/blocks), updated in place
    count: Tensor,  # (), updated in place
    z: Tensor,  # (..., d)
    offset: Tensor,  # () int64
    stride: int,
    sequence_length: int,
) -> None:
    """S += Σ z zᵀ and count += n, as one opaque operator that torch.compile does not look into.

    Made for the backward of an autograd.Function. See `gram` for the arguments.
    """
    count += gram_(
        S, z, beta=1, alpha=1, stride=stride, offset=offset, sequence_length=sequence_length
    )
    offset += z.numel() // max(1, sequence_length * z.shape[-1])


@accumulate_gram.register_fake
def _(
    S: Tensor, count: Tensor, z: Tensor, offset: Tensor, stride: int, sequence_length: int
) -> None:
    return None


def mirror(Y: Tensor) -> Tensor:  # (..., d, d)
    """Copy the lower triangle onto the upper one: exactly symmetric, each element computed once."""
    return Y.tril() + Y.tril(-1).mT


def _check_gram(z: Tensor, blocks: int, stride: int) -> None:
    if z.ndim < 2 or not z.is_floating_point():
        raise ValueError(f"gram: z is {tuple(z.shape)} {z.dtype}; wants a floating (..., d)")
    if blocks < 1 or z.shape[-1] % blocks:
        raise ValueError(
            f"gram: {z.shape[-1]} features do not divide into blocks={blocks}; use a divisor"
        )
    if stride < 1:
        raise ValueError(f"gram: stride={stride}; wants at least 1")


def _sample(z: Tensor, stride: int, offset: int | Tensor, sequence_length: int | None) -> Tensor:
    """The rows (n, d) of z that count: ⌈T / stride⌉ of each sequence of T."""
    T = z.shape[-2] if sequence_length is None else sequence_length
    rows = z.reshape(-1, z.shape[-1])  # (B T, d)
    if rows.shape[0] == 0:
        return rows
    if T < 1 or rows.shape[0] % T:
        raise ValueError(
            f"gram: {rows.shape[0]} tokens do not divide into sequences of sequence_length={T}"
        )
    if stride == 1:
        return rows
    first = torch.arange(rows.shape[0] // T, device=z.device)[:, None]  # (B, 1)
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
