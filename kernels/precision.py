"""Compute matrix products in full precision, whatever the caller has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Compute matrix products in the precision of their factors: without TF32 and autocast.

    The context manager sets `fp32_precision`, which matrix products read and which can always be
    queried. torch.get_float32_matmul_precision() raises if `fp32_precision` was set before.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
