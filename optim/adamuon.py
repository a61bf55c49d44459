"""AdaMuon: the orthogonalised sign of the momentum, normalised by its own second moment."""

import math
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .kernels.dispatch import Backend
from .kernels.newton_schulz import NSCoefficients
from .matrices import Matrices
from .muon import IterationDtype, MatrixOptimizer, momentum_direction, orthogonalize_all
from .process_group import ProcessGroup, local

UPDATE_RMS = 0.2  # of a typical AdamW update


def adamuon_update(
    grads: list[Tensor],  # each (d_out, d_in), or the rows of it that are here
    momentum_buffers: list[Tensor],  # like grads
    second_moments: list[Tensor],  # like grads
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
) -> list[Tensor]:  # like grads; each block has RMS 0.2
    """AdaMuon's update of many matrices; both lists of buffers are advanced.

    `matrices` says what of them is here; none given: all.

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
    matrices = matrices or Matrices(grads, None)
    orthogonalize_ = partial(
        orthogonalize_all,
        qkv_blocks=qkv_blocks,
        steps=ns_steps,
        ns_coefficients=ns_coefficients,
        ns_dtype=ns_dtype,
        backend=backend,
    )
    updates = matrices.by_owners(signs, orthogonalize_)
    for update, second_moment in zip(updates, second_moments, strict=True):
        second_moment.lerp_(update.square(), 1 - momentum)
        update.div_(second_moment.sqrt().add_(eps))
    return rms_aligned(updates, matrices, qkv_blocks=qkv_blocks)


def rms_aligned(updates: list[Tensor], matrices: Matrices, *, qkv_blocks: int) -> list[Tensor]:
    """`updates` with every row block rescaled to RMS 0.2; a block of zeros stays zero."""
    aligned = []
    for i, norm in enumerate(matrices.block_norms(updates, qkv_blocks)):  # (blocks,)
        d_out, d_in = matrices.shapes[i]
        factor = UPDATE_RMS * math.sqrt(d_out // qkv_blocks * d_in) / norm.where(norm > 0, 1)
        of_row = factor[matrices.block_of_rows(i, updates[i], qkv_blocks)]  # (rows here,)
        aligned.append(updates[i].contiguous() * of_row[:, None])
    return aligned


class AdaMuon(MatrixOptimizer):
    """W <- (1 - lr·weight_decay) W - lr·lr_mult·update; see `adamuon_update`.

    Args:
        params: 2-D parameters (d_out, d_in); a param group may set `blocks`, see `optim.muon.Muon`.
        momentum: β, of both moments, in [0, 1).
        eps: added to the square root of the second moment, positive.
        ns_steps, coefficients, ns_dtype: of `kernels.newton_schulz.orthogonalize`. The paper's
            iteration is "quintic" in bfloat16.
        kernel, process_group: as in `optim.muon.Muon`.
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
        ns_coefficients: NSCoefficients = "polar_express",
        ns_dtype: IterationDtype = "bfloat16",
        backend: Backend = "auto",
        process_group: ProcessGroup | None = None,
    ) -> None:
        settings = {"momentum": momentum, "nesterov": nesterov, "eps": eps, "qkv_blocks": 1}
        newton_schulz = {
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "ns_dtype": ns_dtype,
        }
        defaults = {"lr": lr, "weight_decay": weight_decay, **settings, **newton_schulz}
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
