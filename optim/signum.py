"""Signum: the sign of a moving average of the gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import DecoupledOptimizer
from .process_group import local


def signum_update(
    grads: list[Tensor],
    momentum_buffers: list[Tensor],  # like grads, updated in place
    *,
    momentum: float,
) -> list[Tensor]:  # like grads
    """Return sign(m) with m <- momentum·m + (1 - momentum)·grad, for every pair.

    Tensors may have any shape. Every entry of an update is -1, 0 or 1. With momentum 0, the update
    is sign(grad).

    Source: Bernstein et al., signSGD, arXiv 1802.04434, Algorithm 2. m starts at zero there, too; a
    bias correction would not change its sign.
    """
    torch._foreach_lerp_(momentum_buffers, grads, 1 - momentum)  # pyright: ignore
    return list(torch._foreach_sign(momentum_buffers))  # pyright: ignore


class Signum(DecoupledOptimizer):
    """W <- (1 - lr·weight_decay) W - lr·lr_mult·sign(m); see `signum_update`.

    Args:
        lr: the magnitude of every entry of the update.
        momentum: the decay of the moving average, in [0, 1).
    Raises:
        ValueError: see `DecoupledOptimizer`.
    """

    buffers = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def updates(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        return signum_update(
            [local(p.grad) for p in params],
            [local(self.state[p]["momentum_buffer"]) for p in params],
            momentum=group["momentum"],
        )
