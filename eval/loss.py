"""Compute the loss on a fixed set of batches as an exact sum over tokens."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.sampling import wide_device
from model import IGNORE, eval_mode


@dataclass(frozen=True)
class Loss:
    """The result of `evaluate`."""

    loss: float  # nats per scored token
    bits_per_byte: float  # comparable between tokenizers; NaN if only end-of-text was scored
    n_tokens: int  # number of scored tokens


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: np.ndarray,
    *,
    device: str | torch.device,
    autocast: AbstractContextManager = nullcontext(),  # noqa: B008 - it has no state
    should_stop: Callable[[], bool] = lambda: False,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Loss | None:
    """Compute the cross-entropy of `model` over all scored targets.

        loss = Σ nats / n_tokens        bits_per_byte = Σ nats / ln 2 / Σ bytes of the targets

    Every scored target counts once, so the result does not depend on how tokens are batched.

    Args:
        model: returns (logits (B, T, V), _). It runs in eval mode and gets its mode back.
        batches: pairs (x, y) of int64 tensors (B, T) on the CPU; a target of -1 is not scored.
        token_bytes: (n_vocab,) number of bytes of each token; 0 for end-of-text.
        autocast: a context manager that is entered once per batch.
        should_stop: called before each batch. If it returns True, `evaluate` returns None, because
            a loss over some of the batches cannot be compared with any other loss.
        total: sums a tensor over all processes. Pass it when each process evaluates some batches.
    Raises:
        ValueError: no target is scored.
    """
    wide = wide_device(device)
    nats = torch.zeros((), dtype=torch.float64, device=wide)
    n_tokens, n_bytes = torch.zeros((2,), dtype=torch.int64, device=device)
    sizes = torch.as_tensor(token_bytes, dtype=torch.int64, device=device)
    with eval_mode(model), torch.no_grad():
        for x, y in batches:
            if should_stop():
                return None
            x, y = x.to(device), y.to(device)
            with autocast:
                logits, _ = model(x)
            losses = F.cross_entropy(  # (B T,), 0 where nothing is scored
                logits.flatten(0, 1).float(), y.flatten(), ignore_index=IGNORE, reduction="none"
            )
            scored = y != IGNORE  # (B, T)
            nats += losses.to(wide).sum(dtype=torch.float64)
            n_tokens += scored.sum()
            n_bytes += sizes[y[scored]].sum()
    sums = torch.stack([nats, *(each.to(wide).double() for each in (n_tokens, n_bytes))])
    nats, *counts = total(sums).tolist()
    return _loss(nats, *map(int, counts))


def _loss(nats: float, n_tokens: int, n_bytes: int) -> Loss:
    if not n_tokens:
        raise ValueError(
            "the batches contain no scored target: every y is -1, or there is no batch"
        )
    bits_per_byte = nats / math.log(2) / n_bytes if n_bytes else math.nan
    return Loss(loss=nats / n_tokens, bits_per_byte=bits_per_byte, n_tokens=n_tokens)
