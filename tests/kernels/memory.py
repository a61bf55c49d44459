"""Tensors with guard elements around them, which reveal reads and writes out of bounds."""

import torch

GUARD = 64  # guard elements on each side; a multiple of the alignment


def guarded(x, guard=torch.nan):
    """Return a copy of x with `guard` on both sides, and the buffer that contains both."""
    buffer = torch.full((x.numel() + 2 * GUARD,), guard, dtype=x.dtype, device=x.device)
    return buffer[GUARD:-GUARD].view(x.shape).copy_(x), buffer


def is_intact(buffer, guard=torch.nan):
    """Return whether the guards of a buffer still hold their value."""
    sides = torch.cat([buffer[:GUARD], buffer[-GUARD:]])
    return torch.equal(sides.nan_to_num(-1), torch.full_like(sides, guard).nan_to_num(-1))
