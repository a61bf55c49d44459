"""Pack symmetric matrices for messages: little more than the upper triangle of each is sent.

A matrix is cut into strips of rows, and of each strip the part from the diagonal on is sent. Strips
are copied faster than single elements are gathered, and need no memory for indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from torch import Tensor

N_STRIPS = 16  # so that 1/32 of a matrix is sent twice


def pack(S: Tensor) -> Tensor:
    """Return the upper triangles of (blocks, b, b) as one vector. Returns (d,) unchanged."""
    if S.dim() == 1:
        return S
    packed, end = S.new_empty(packed_numel(S.shape)), 0
    for rows in _strips(S.shape[-1]):
        strip = S[:, rows, rows.start :]
        start, end = end, end + strip.numel()
        packed[start:end].view(strip.shape).copy_(strip)
    return packed


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a copy of the symmetric blocks of this shape that `pack` packed."""
    if len(shape) == 1:
        return packed.clone()
    blocks, b, _ = shape
    S, end = packed.new_empty(shape), 0
    for rows in _strips(b):
        height, width = rows.stop - rows.start, b - rows.start
        start, end = end, end + blocks * height * width
        strip = packed[start:end].view(blocks, height, width)
        S[:, rows, rows.start :] = strip
        S[:, rows.stop :, rows] = strip[:, :, height:].mT
    return S


@cache
def packed_numel(shape: tuple[int, ...]) -> int:
    """Return the number of elements that `pack` returns for this shape."""
    if len(shape) == 1:
        return shape[0]
    blocks, b, _ = shape
    return blocks * sum((rows.stop - rows.start) * (b - rows.start) for rows in _strips(b))


def _strips(b: int) -> Iterator[slice]:
    """Yield the rows of each strip of a matrix of b rows."""
    height = max(1, -(-b // N_STRIPS))
    for start in range(0, b, height):
        yield slice(start, min(start + height, b))
