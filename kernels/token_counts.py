"""Count the token ids that an embedding sees: the diagonal of Σ z zᵀ over one-hot inputs z."""

from __future__ import annotations

import torch
from torch import Tensor

from .operators import check_not_recording, opaque


@opaque("dopr::accumulate_token_counts", mutates_args=("S", "count"))
def accumulate_token_counts(
    S: Tensor,  # (vocabulary,), updated in place
    count: Tensor,  # (), updated in place
    idx: Tensor,  # (...) token ids
    skips: Tensor,  # () bool, on the CPU
    grad_y: Tensor | None = None,  # (..., d_out)
    padding_idx: int | None = None,
) -> None:
    """Add a batch: S[t] grows by the number of ids t, `count` by that of all ids; not if `skips`.

    Ids whose row of `grad_y`, the gradient of the layer's output, is zero are not counted, nor are
    those equal to `padding_idx`. None counts all ids.
    """
    check_not_recording(idx.device)
    if skips:
        return
    n = S.numel()
    ids = idx.flatten()
    if grad_y is not None:  # ids that are not counted become n, which is no id
        ids = ids.where((grad_y != 0).any(-1).flatten(), n)
    counts = torch.bincount(ids, minlength=n + 1)[:n]
    if padding_idx is not None:
        counts[padding_idx] = 0
    S += counts
    count += counts.sum()
