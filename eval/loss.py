"""The loss on a fixed set of batches: an exact sum over tokens, whatever the batches look like."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import IGNORE, eval_mode


@dataclass(frozen=True)
class Loss:
    loss: float  # nats per scored token
    bits_per_byte: float  # comparable between tokenizers; nan if only end-of-text was scored
    n_tokens: int  # scored


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
    """Cross-entropy of `model` over every scored target, each counted once.

        loss = Σ nats / n_tokens        bits_per_byte = Σ nats / ln 2 / Σ bytes of the targets

    Args:
        model: returns (logits (B, T, V), _); is in eval mode meanwhile, then as it was.
        batches: (x, y) int64 (B, T) on the CPU; y == -1 is not scored.
        token_bytes: (n_vocab,) bytes of each token; 0 for end-of-text.
        autocast: entered once per batch.
        should_stop: asked before each batch; if it says yes the result is None, because the loss
            of a part of the batches compares to nothing.
        total: sums over the processes, where each evaluates some of the batches.
    Raises:
        ValueError: no target is scored.
    """
    nats = torch.zeros((), dtype=torch.float64, device=device)
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
            nats += losses.sum(dtype=torch.float64)
            n_tokens += scored.sum()
            n_bytes += sizes[y[scored]].sum()
    nats, *counts = total(torch.stack([nats, n_tokens.double(), n_bytes.double()])).tolist()
    return _loss(nats, *map(int, counts))


def _loss(nats: float, n_tokens: int, n_bytes: int) -> Loss:
    if not n_tokens:
        raise ValueError("the batches hold no scored target (every y is -1, or there is no batch)")
    bits_per_byte = nats / math.log(2) / n_bytes if n_bytes else math.nan
    return Loss(loss=nats / n_tokens, bits_per_byte=bits_per_byte, n_tokens=n_tokens)
