"""Draw the next tokens from a model's logits."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model import require

MIN_TEMPERATURE = 1e-30  # logits divided by less may exceed float32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw the next token. The defaults sample from the model's own distribution.

    Raises ValueError for values out of range.
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None  # keep only the k likeliest tokens
    top_p: float | None = None  # keep the fewest likeliest tokens with this total probability
    greedy: bool = False  # take the likeliest token and ignore the other fields

    def __post_init__(self) -> None:
        t, k, p = self.temperature, self.top_k, self.top_p
        wanted = f"must be 0, or finite and at least {MIN_TEMPERATURE:g}"
        claims = {f"temperature={t}: {wanted}": t == 0 or MIN_TEMPERATURE <= t < math.inf}
        claims[f"top_k={k}: must be at least 1"] = k is None or k >= 1
        claims[f"top_p={p}: must be in (0, 1]"] = p is None or 0 < p <= 1
        require(claims)


def wide_device(device: str | torch.device) -> torch.device:
    """Return the device for float64 numbers beside this one: the same, or the CPU for MPS."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def sample_tokens(logits: Tensor, uniforms: Tensor, how: Sampling) -> Tensor:
    """Draw the next tokens (B,) from logits (B, V) by inverting the cumulative distribution.

    Args:
        uniforms: (B,) float64 in [0, 1), on `wide_device(logits.device)`. Two models that get the
            same numbers are compared with common random numbers.
    """
    if how.greedy or how.temperature == 0:
        return logits.max(dim=-1).indices  # the first of equal ones; faster than argmax on CPUs
    values, ids = logits.float().to(wide_device(logits.device)).contiguous(), None
    if how.temperature != 1:
        values = values / how.temperature
    V = logits.size(-1)
    if how.top_k is not None or how.top_p is not None:
        values, ids = values.topk(min(how.top_k or V, V), dim=-1)  # likeliest first
    p = values.softmax(dim=-1)
    cdf = p.cumsum(dim=-1, dtype=torch.float64)
    if how.top_p is not None:
        cdf = (p * (cdf - p < how.top_p)).cumsum(dim=-1, dtype=torch.float64)
    target = uniforms[:, None] * cdf[:, -1:]  # below the last value of cdf, as u < 1
    chosen = torch.searchsorted(cdf, target, right=True)  # (B, 1)
    return (chosen if ids is None else ids.gather(-1, chosen))[:, 0].to(logits.device)
