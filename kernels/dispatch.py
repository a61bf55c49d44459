"""Select an implementation of an operation: the torch reference or the Triton kernel.

Triton is optional and slow to import, so it is imported only where it would be used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]
Implementation = Literal["torch", "triton"]

BACKENDS: tuple[Backend, ...] = get_args(Backend)
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COPY_BYTES = 16  # the size and the alignment of an asynchronous copy
log = logging.getLogger("dopr")


def choose_backend(
    backend: Backend, operation: str, *tensors: Tensor, row_bytes: Iterable[int]
) -> Implementation:
    """Return the implementation of `operation` to use for these tensors.

    "torch" and "triton" are returned unchanged. "auto" selects Triton if all tensors are bf16, fp16
    or fp32 on a CUDA GPU that Triton supports, and if their rows suit asynchronous copies: every
    row pitch in `row_bytes` must be a multiple of 16 bytes. The choice of "auto" is logged once per
    process for each operation and reason.

    This function does not check whether an explicit "triton" can run: call `check_backend` first.

    Raises:
        ValueError: `backend` is not one of BACKENDS.
    """
    check_backend(backend, ())
    if backend != "auto":
        return backend
    reason = _reason_for_torch(tensors, row_bytes)
    _log_choice(operation, reason)
    return "torch" if reason else "triton"


def check_backend(backend: str, tensors: Iterable[Tensor]) -> None:
    """Raise ValueError if `backend` is unknown, or is "triton" and cannot run on the tensors."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
    if backend != "triton":
        return
    for device, dtype in {(tensor.device, tensor.dtype) for tensor in tensors}:
        problem = triton_problem(device, dtype)
        if problem:
            raise ValueError(problem)


def triton_problem(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Return an error message if backend="triton" cannot run on such tensors, else ""."""
    obstacle = _device_obstacle(device)
    if not obstacle and dtype not in TRITON_DTYPES:
        obstacle = f"does not support {dtype}"
    return obstacle and f"backend='triton' {obstacle}. Use backend='torch'."


def describe_backend(backend: Backend, device: torch.device) -> str:
    """Return one line for the log that says which backend runs on `device`."""
    if backend != "auto":
        return f"backend: {backend}"
    reason = _gpu_obstacle(device)
    if reason:
        return f"backend: torch (auto: {reason})"
    return f"backend: triton (auto; torch for rows that are not multiples of {COPY_BYTES} bytes)"


def _reason_for_torch(tensors: tuple[Tensor, ...], row_bytes: Iterable[int]) -> str:
    """Return the reason why "auto" selects torch, or "" if it selects Triton."""
    for tensor in tensors:
        reason = _gpu_obstacle(tensor.device)
        if reason:
            return reason
        if tensor.dtype not in TRITON_DTYPES:
            return f"Triton does not support {tensor.dtype}"
    if any(n % COPY_BYTES for n in row_bytes):
        return f"rows are not multiples of {COPY_BYTES} bytes"
    return ""


def _gpu_obstacle(device: torch.device) -> str:
    """Like `_device_obstacle`, but never accept the CPU, even if Triton is interpreted."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    return _device_obstacle(device)


def _device_obstacle(device: torch.device) -> str:
    """Return the reason why the Triton kernels cannot run on `device`, or ""."""
    is_interpreted = _is_interpreted()
    if not torch.cuda.is_available() and not is_interpreted:
        return "needs CUDA or TRITON_INTERPRET=1; this host has neither"
    if is_interpreted is None:
        return "needs the package triton, which cannot be imported here"
    if is_interpreted:
        return ""
    if device.type != "cuda":
        return f"needs tensors on a CUDA GPU; these are on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs compute capability 8.0 or more; {device} has {major}.{minor}"
    return ""


@cache
def _log_choice(operation: str, reason: str) -> None:
    chosen = f"torch ({reason})" if reason else "triton"
    log.info("%s: backend='auto' uses %s", operation, chosen)


@cache
def _is_interpreted() -> bool | None:
    """Return whether Triton interprets its kernels on the CPU, or None if it is not installed."""
    try:
        from ._triton_tiles import INTERPRETED
    except ImportError:
        return None
    return INTERPRETED.value
