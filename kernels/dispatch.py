"""Which implementation of an operation runs: torch's, or the Triton kernels of `_triton_*.py`.

Triton is optional and slow to import, so it is looked for only where it would be used.
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
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COPY_BYTES = 16  # an asynchronous copy moves so many, from an address that is a multiple of it
log = logging.getLogger("dopr")


def choose_backend(
    backend: Backend, operation: str, *tensors: Tensor, row_bytes: Iterable[int]
) -> Implementation:
    """Which implementation of `operation` takes these tensors: `kernel`, unless that is auto.

    Auto takes Triton where all tensors are on a CUDA GPU that it can run on, in bf16, fp16 or fp32,
    and the rows that it reads, `row_bytes` apart, suit asynchronous copies: multiples of 16 bytes.
    Its choice is logged, once a process for each operation and reason. Raises ValueError for an
    unknown `kernel`; whether "triton" can run is for `check_kernel` to say, and for the kernel.
    """
    check_backend(backend, ())
    if backend != "auto":
        return backend
    reason = _auto_obstacle(tensors, row_bytes)
    _log_choice(operation, reason)
    return "torch" if reason else "triton"


def check_backend(backend: str, tensors: Iterable[Tensor]) -> None:
    """Raises ValueError for an unknown `kernel`, or for "triton" where it cannot run on these."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
    if backend != "triton":
        return
    for device, dtype in {(tensor.device, tensor.dtype) for tensor in tensors}:
        problem = triton_problem(device, dtype)
        if problem:
            raise ValueError(problem)


def triton_problem(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """What is wrong with backend="triton" for such tensors; empty if nothing is."""
    obstacle = device_obstacle(device)
    if not obstacle and dtype not in DTYPES:
        obstacle = f"takes no {dtype}"
    return obstacle and f"backend='triton' {obstacle}. Use backend='torch'."


def device_obstacle(device: torch.device) -> str:
    """Why the Triton kernels cannot run on tensors of `device`; empty if they can."""
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


def describe_backend(backend: Backend, device: torch.device) -> str:
    """One line for people: what `kernel` means on `device`."""
    if backend != "auto":
        return f"kernels: {backend}"
    reason = _on_gpu_obstacle(device)
    if reason:
        return f"kernels: torch (auto: {reason})"
    return f"kernels: triton (auto; torch for rows that are not multiples of {COPY_BYTES} bytes)"


def _auto_obstacle(tensors: tuple[Tensor, ...], row_bytes: Iterable[int]) -> str:
    """Why auto takes torch; empty if it takes Triton."""
    for tensor in tensors:
        reason = _on_gpu_obstacle(tensor.device)
        if reason:
            return reason
        if tensor.dtype not in DTYPES:
            return f"Triton takes no {tensor.dtype}"
    if any(each % COPY_BYTES for each in row_bytes):
        return f"rows are not multiples of {COPY_BYTES} bytes"
    return ""


def _on_gpu_obstacle(device: torch.device) -> str:
    """As `device_obstacle`, but that Triton is interpreted is no reason to take it on a CPU."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    return device_obstacle(device)


@cache
def _log_choice(operation: str, reason: str) -> None:
    chosen = f"torch ({reason})" if reason else "triton"
    log.info("%s: backend='auto' takes %s", operation, chosen)


@cache
def _is_interpreted() -> bool | None:
    """Whether Triton interprets its kernels on the CPU; None where it cannot be imported."""
    try:
        from ._triton_tiles import INTERPRETED
    except ImportError:
        return None
    return INTERPRETED.value
