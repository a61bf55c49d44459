"""Memory with guards around it, which show who reads or writes too far."""

import torch

GUARD = 64  # elements on each side, which keeps the alignment


def guarded(x, guard=torch.nan):
    """A copy of x with `guard` on both sides, and the buffer that holds it all."""
    buffer = torch.full((x.numel() + 2 * GUARD,), guard, dtype=x.dtype, device=x.device)
    return buffer[GUARD:-GUARD].view(x.shape).copy_(x), buffer


def is_intact(buffer, guard=torch.nan):
    sides = torch.cat([buffer[:GUARD], buffer[-GUARD:]])
    return torch.equal(sides.nan_to_num(-1), torch.full_like(sides, guard).nan_to_num(-1))
