"""AdaMuon: the orthogonalised sign of the momentum, normalised by its own second moment."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from kernels.choice import Kernel
from kernels.newton_schulz import Coefficients
from optim.muon import IterationDtype, MatrixOptimizer, momentum_direction, orthogonalize_all

UPDATE_RMS = 0.2  # of a typical AdamW update


def adamuon_update(
    grads: list[Tensor],  # each (d_out, d_in)
    momentum_buffers: list[Tensor],  # like grads
    second_moments: list[Tensor],  # like grads
    *,
    momentum: float,
    nesterov: bool,
    eps: float,
    blocks: int,
    ns_steps: int,
    coefficients: Coefficients,
    ns_dtype: IterationDtype,
    kernel: Kernel = "auto",
) -> list[Tensor]:  # like grads; each block has RMS 0.2
    """AdaMuon's update of many matrices; both lists of buffers are advanced.

        M <- β M + G                            β = momentum
        O  = orthogonalise(sign(M))             per row block
        V <- β V + (1 - β) O ⊙ O
        Ô  = O / (√V + eps)
        update = 0.2 √(m n) / ‖Ô‖_F · Ô         per row block of shape (m, n)

    Source: Si, Zhang, Shen, AdaMuon, arXiv 2507.11005v3, Algorithm 1: one β for both moments and no
    bias correction, which the last line would cancel. M is kept as (1 - β) times the paper's, of
    the same sign. With `nesterov`, as in the authors' code, sign sees G + β M instead of M.
    """
    signs = [
        momentum_direction(grad, buffer, momentum=momentum, nesterov=nesterov).sign()
        for grad, buffer in zip(grads, momentum_buffers, strict=True)
    ]
    updates = orthogonalize_all(
        signs,
        blocks=blocks,
        steps=ns_steps,
        coefficients=coefficients,
        ns_dtype=ns_dtype,
        kernel=kernel,
    )
    for update, second_moment in zip(updates, second_moments, strict=True):
        second_moment.lerp_(update.square(), 1 - momentum)
        update.div_(second_moment.sqrt().add_(eps))
    return [rms_aligned(update, blocks=blocks) for update in updates]


def rms_aligned(update: Tensor, *, blocks: int) -> Tensor:  # (d_out, d_in)
    """`update` with every row block rescaled to RMS 0.2; a block of zeros stays zero."""
    flat = update.reshape(blocks, -1)
    norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True)  # (blocks, 1)
    factor = UPDATE_RMS * math.sqrt(flat.shape[1]) / norm.where(norm > 0, 1)
    return (flat * factor).view_as(update)


class AdaMuon(MatrixOptimizer):
    """W <- (1 - lr·weight_decay) W - lr·lr_mult·update; see `adamuon_update`.

    Args:
        params: 2-D parameters (d_out, d_in); a param group may set `blocks`, see `optim.muon.Muon`.
        momentum: β, of both moments, in [0, 1).
        eps: added to the square root of the second moment, positive.
        ns_steps, coefficients, ns_dtype: of `kernels.newton_schulz.orthogonalize`. The paper's
            iteration is "quintic" in bfloat16.
        kernel: auto, torch or triton, for the orthogonalisation; see `kernels.choice.choose`.
    Raises:
        ValueError: as `optim.muon.Muon`.
    """

    buffers = ("momentum_buffer", "second_moment")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        ns_steps: int = 5,
        coefficients: Coefficients = "polar_express",
        ns_dtype: IterationDtype = "bfloat16",
        kernel: Kernel = "auto",
    ) -> None:
        settings = {"momentum": momentum, "nesterov": nesterov, "eps": eps, "blocks": 1}
        newton_schulz = {"ns_steps": ns_steps, "coefficients": coefficients, "ns_dtype": ns_dtype}
        defaults = {"lr": lr, "weight_decay": weight_decay, **settings, **newton_schulz}
        super().__init__(params, defaults, kernel)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if not 0 < group["eps"] < math.inf:
            raise ValueError(f"AdaMuon: eps={group['eps']}: must be positive and finite")

    def updates(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        return adamuon_update(
            [p.grad for p in params if p.grad is not None],
            [self.state[p]["momentum_buffer"] for p in params],
            [self.state[p]["second_moment"] for p in params],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            eps=group["eps"],
            blocks=group["blocks"],
            ns_steps=group["ns_steps"],
            coefficients=group["coefficients"],
            ns_dtype=group["ns_dtype"],
            kernel=self.kernel,
        )
