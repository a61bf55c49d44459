"""AdaMuon: the orthogonalized sign of the momentum, normalized by its second moment."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .kernels.dispatch import Backend
from .kernels.newton_schulz import NSCoefficients
from .matrices import Matrices
from .muon import IterationDtype, MatrixOptimizer, momentum_directions, orthogonalize_all
from .process_group import ProcessGroup, local

UPDATE_RMS = 0.2  # the RMS of a typical AdamW update


def adamuon_update(
    grads: list[Tensor],  # each (d_out, d_in), or its local rows
    momentum_buffers: list[Tensor],  # like grads, updated in place
    second_moments: list[Tensor],  # like grads, updated in place
    *,
    momentum: float,
    nesterov: bool,
    eps: float,
    qkv_blocks: int,
    ns_steps: int,
    ns_coefficients: NSCoefficients,
    ns_dtype: IterationDtype,
    backend: Backend = "auto",
    matrices: Matrices | None = None,
) -> list[Tensor]:  # like grads; each row block has RMS 0.2
    """Return AdaMuon's update of many matrices.

        M <- β M + G                            β = momentum
        O  = orthogonalize(sign(M))             per row block
        V <- β V + (1 - β) O ⊙ O
        Ô  = O / (√V + eps)
        update = 0.2 √(m n) / ‖Ô‖_F · Ô         per row block of shape (m, n)

    The momentum buffer stores (1 - β) M, which has the same sign. With `nesterov`, sign(G + β M)
    replaces sign(M), as in the authors' code.

    Args:
        matrices: the layout of the weights over processes. Defaults to unsharded weights.
        others: see `AdaMuon`.

    Source: Si, Zhang, Shen, AdaMuon, arXiv 2507.11005v3, Algorithm 1. It uses one β for both
    moments and no bias correction, which the last line would cancel.
    """
    directions = momentum_directions(grads, momentum_buffers, momentum=momentum, nesterov=nesterov)
    signs = list(torch._foreach_sign(directions))  # pyright: ignore
    matrices = matrices or Matrices(grads, None)
    work = partial(
        orthogonalize_all,
        qkv_blocks=qkv_blocks,
        steps=ns_steps,
        ns_coefficients=ns_coefficients,
        ns_dtype=ns_dtype,
        backend=backend,
    )
    updates = matrices.by_owners(signs, work)
    squares = torch._foreach_mul(updates, updates)  # pyright: ignore
    torch._foreach_lerp_(second_moments, squares, 1 - momentum)  # pyright: ignore
    del squares  # frees its memory
    denominators = torch._foreach_sqrt(second_moments)  # pyright: ignore
    torch._foreach_add_(denominators, eps)  # pyright: ignore
    torch._foreach_div_(updates, denominators)  # pyright: ignore
    return _rescale_blocks(updates, matrices, qkv_blocks)


def _rescale_blocks(updates: list[Tensor], matrices: Matrices, qkv_blocks: int) -> list[Tensor]:
    """Rescale every row block to RMS 0.2; a block of zeros stays zero."""
    rescaled = []
    for i, norm in enumerate(matrices.block_norms(updates, qkv_blocks)):  # (qkv_blocks,)
        d_out, d_in = matrices.shapes[i]
        factor = UPDATE_RMS * math.sqrt(d_out // qkv_blocks * d_in) / norm.where(norm > 0, 1)
        row_factor = factor[matrices.block_of_rows(i, updates[i], qkv_blocks)]  # (local rows,)
        rescaled.append(updates[i].contiguous() * row_factor[:, None])
    return rescaled


class AdaMuon(MatrixOptimizer):
    """W <- (1 - lr·weight_decay) W - lr·lr_mult·update; see `adamuon_update`.

    Args:
        params: 2-D parameters (d_out, d_in). A param group may set `qkv_blocks`; see `Muon`.
        momentum: β of both moments, in [0, 1).
        nesterov: see `adamuon_update`.
        eps: positive number that is added to the square root of the second moment.
        ns_steps, ns_coefficients, ns_dtype: see `Muon`. The paper uses "quintic" in bfloat16.
        backend, process_group: see `Muon`.
    Raises:
        ValueError: see `Muon`.
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
        ns_coefficients: NSCoefficients = "polar_express",
        ns_dtype: IterationDtype = "auto",
        backend: Backend = "auto",
        process_group: ProcessGroup | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "eps": eps,
            "qkv_blocks": 1,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "ns_dtype": ns_dtype,
        }
        super().__init__(params, defaults, backend, process_group)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if not 0 < group["eps"] < math.inf:
            raise ValueError(f"AdaMuon: eps={group['eps']}: must be positive and finite")

    def updates(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        return adamuon_update(
            [local(p.grad) for p in params],
            [local(self.state[p]["momentum_buffer"]) for p in params],
            [local(self.state[p]["second_moment"]) for p in params],
            eps=group["eps"],
            **self.settings(params, group),
        )
