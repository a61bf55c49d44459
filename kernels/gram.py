"""Second-moment sums of a layer's inputs: S = Σ z zᵀ, block-diagonal, over a sample of the tokens.

`gram_` is the torch reference and the specification of the Triton kernel in `_triton_gram.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .dispatch import choose_backend
from .operators import check_not_recording, opaque
from .symmetric import MIN_STRIP, add_symmetric_product_, mirror_


def gram_(
    S: Tensor,  # (blocks, d/blocks, d/blocks), updated in place
    z: Tensor,  # (..., T, d), one row per token
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
    stride: int = 1,
    offset: int | Tensor = 0,
    column_sums: Tensor | None = None,  # (d,), updated in place
) -> int:  # count
    """Update S <- β S + α Σ z zᵀ in place over the sampled tokens and return their number.

    If given, `column_sums` grows by Σ z over the same tokens.

    z is cut into `blocks` equal slices along its last dimension; S[k] accumulates Σ z_k z_kᵀ. The
    sum is formed in at least fp32, in float64 if z and S are. It is exactly symmetric: the upper
    triangle is a copy of the lower one. Starting from S = 0 with α = 1, the covariance Σ is
    S / count.

    Sequence number b contributes the tokens (offset + b + j·stride) mod T for j = 0, 1, ...,
    ⌈T / stride⌉ - 1. The first position differs between sequences, so a stride that divides T still
    reaches every position. The count depends on the shapes only. Advance `offset` from one call to
    the next; pass it as an int64 tensor to avoid a recompilation.

    Raises:
        ValueError: the shapes or devices of S, z and `column_sums` do not match, z is not
            floating-point, S is neither fp32 nor float64, or `stride` is below 1.
    """
    check_gram(S, z, stride, column_sums)
    rows = _sample(z.detach(), stride, offset)  # (n, d)
    if column_sums is not None:
        column_sums += rows.sum(0, dtype=column_sums.dtype)
    slices = rows.reshape(len(rows), *S.shape[:2]).transpose(0, 1)  # (blocks, n, d/blocks)
    with torch.autocast(z.device.type, enabled=False):
        if S.is_cpu and S.shape[-1] > MIN_STRIP:
            for block, each in zip(S, slices.to(S.dtype), strict=True):
                add_symmetric_product_(block, each, each, beta=beta, alpha=alpha)
        else:  # a fused multiply-add would break the exact symmetry
            S.mul_(beta).add_(mirror_(_inner_products(slices)).mul_(alpha))
    return len(rows)


@opaque("dopr::accumulate_gram", mutates_args=("S", "count", "offset", "column_sums"))
def accumulate_gram(
    S: Tensor,  # (blocks, d/blocks, d/blocks), updated in place
    count: Tensor,  # (), updated in place
    z: Tensor,  # (..., T, d)
    offset: Tensor,  # () int64, updated in place
    skips: Tensor,  # () bool, on the CPU, so that reading it does not synchronize
    stride: int,
    backend: str = "auto",  # a `Backend`
    rank: int = 0,
    size: int = 1,
    grad_y: Tensor | None = None,  # (..., T, d_out)
    column_sums: Tensor | None = None,  # (2, d + 1), updated in place
    column_sums_only: bool = False,
) -> None:
    """Add a batch: S += Σ z zᵀ, count += n, offset += sequences; do nothing if `skips`.

    Tokens whose row of `grad_y`, the gradient of the layer's output, is zero add nothing and are
    not counted. None counts all tokens.

    If given, both rows of `column_sums` grow by (Σ z, number of tokens) over the same tokens. With
    `column_sums_only`, its row 0 grows, and nothing else changes.

    See `gram_` for S, z, `stride` and `offset`. With `size` processes, each passing a batch of the
    same size, rank r continues the sequence numbers of rank r - 1.

    This is meant for the backward of an autograd.Function: `skips` is read each time the backward
    runs, also in compiled code.
    """
    check_not_recording(z.device)
    if skips:
        return
    # On a CPU the first column shows in a fraction of the time that no row is zero, as is usual. On
    # a GPU, reading a result would wait for the device.
    if grad_y is not None and grad_y.is_cpu and (grad_y[..., 0] != 0).all():
        grad_y = None
    n_sequences = z.shape[:-2].numel()
    first = offset + rank * n_sequences if rank else offset
    if stride > 1 and (grad_y is not None or column_sums_only):  # read only what is sampled
        z = _sample(z, stride, first)[None]
        grad_y = None if grad_y is None else _sample(grad_y, stride, first)[None]
        stride = 1
    is_masked = None if grad_y is None else _masked_tokens(grad_y)
    if is_masked is not None:
        z = z.masked_fill(is_masked[..., None], 0)
    n = z.shape[:-1].numel()
    sums = None if column_sums is None else column_sums.new_zeros(z.shape[-1])
    if not column_sums_only:
        n = _choose_gram(backend, S, z)(S, z, stride=stride, offset=first, column_sums=sums)
    elif sums is not None:
        sums += z.flatten(0, -2).sum(0, dtype=sums.dtype)
    if is_masked is not None:
        n = (~is_masked).sum()
    if column_sums is not None:
        rows = column_sums[:1] if column_sums_only else column_sums  # (1 or 2, d + 1)
        rows[:, :-1] += sums
        rows[:, -1] += n
    if not column_sums_only:
        count += n
        offset += size * n_sequences


def _masked_tokens(grad_y: Tensor) -> Tensor | None:  # (..., T, d_out) -> (..., T) bool
    """Return which rows of `grad_y` are zero. On a CPU, return None if there are none."""
    is_masked = (grad_y.amax(-1) == 0) & (grad_y.amin(-1) == 0)  # several times faster than `any`
    return None if grad_y.is_cpu and not is_masked.any() else is_masked


def _choose_gram(backend: Any, S: Tensor, z: Tensor) -> Callable[..., int]:
    """Return the implementation of `gram_` that `backend` selects for these tensors."""
    row = z.stride(-2) if z.stride(-1) == 1 else z.shape[-1]
    row_bytes = [n * z.element_size() for n in (row, S.shape[-1])]  # of z and of one slice of z
    if choose_backend(backend, "gram", z, S, row_bytes=row_bytes) == "torch":
        return gram_
    from ._triton_gram import gram_ as triton_gram_

    return triton_gram_


def check_gram(S: Tensor, z: Tensor, stride: int, column_sums: Tensor | None = None) -> None:
    """Raise ValueError if the arguments of `gram_` are invalid."""
    if z.ndim < 2 or not z.is_floating_point():
        raise ValueError(
            f"gram_: expected a floating-point z of shape (..., T, d), but z is {tuple(z.shape)} "
            f"{z.dtype}"
        )
    if S.ndim != 3 or S.shape[1] != S.shape[2] or S.shape[0] * S.shape[1] != z.shape[-1]:
        raise ValueError(
            "gram_: expected S of shape (blocks, d/blocks, d/blocks) for z of shape (..., T, d), "
            f"but S is {tuple(S.shape)} and z is {tuple(z.shape)}"
        )
    if S.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"gram_: expected S in float32 or float64, but S is {S.dtype}")
    if S.device != z.device:
        raise ValueError(
            f"gram_: expected S and z on one device, but S is on {S.device} and z on {z.device}"
        )
    if column_sums is not None and (
        column_sums.shape != z.shape[-1:] or column_sums.device != z.device
    ):
        raise ValueError(
            f"gram_: expected column_sums of shape ({z.shape[-1]},) on {z.device}, but it is "
            f"{tuple(column_sums.shape)} on {column_sums.device}"
        )
    if stride < 1:
        raise ValueError(f"gram_: stride={stride}: must be at least 1")


def _sample(z: Tensor, stride: int, offset: int | Tensor) -> Tensor:
    """Return the sampled rows (n, d) of z, which are ⌈T / stride⌉ of each sequence."""
    T, d = z.shape[-2:]
    rows = z.reshape(-1, d)  # (B T, d)
    if stride == 1 or len(rows) == 0:
        return rows
    sequence = torch.arange(len(rows) // T, device=z.device)[:, None]  # (B, 1)
    steps = torch.arange(0, T, stride, device=z.device)  # (⌈T / stride⌉,)
    index = sequence * T + (sequence + steps + offset) % T  # (B, ⌈T / stride⌉)
    return rows.index_select(0, index.reshape(-1))


def _inner_products(z: Tensor) -> Tensor:  # (blocks, n, d) -> (blocks, d, d)
    """Return zᵀ z, summed in fp32 or better. On CUDA, tensor cores multiply half precision."""
    if z.is_cuda and z.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(z.mT, z, out_dtype=torch.float32)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return z.mT @ z
