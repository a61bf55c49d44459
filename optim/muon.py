"""Muon: orthogonalized momentum, for the 2-D weights of hidden layers."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import DecoupledOptimizer, named_params
from .kernels.dispatch import Backend, check_backend, choose_backend
from .kernels.newton_schulz import NS_COEFFICIENTS, NSCoefficients, orthogonalize
from .legacy_names import renamed_group
from .matrices import Layouts, Matrices
from .process_group import ProcessGroup, local

AdjustLR = Literal["match_rms_adamw", "unit_rms_norm", "original"]
IterationDtype = Literal["auto", "bfloat16", "float32"]

# Factors on an orthogonal (d_out, d_in) matrix, whose spectral norm is 1 and whose RMS entry is
# 1/√max(d_out, d_in).
ADJUST_LR: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda d_out, d_in: 0.2 * math.sqrt(max(d_out, d_in)),
    "unit_rms_norm": lambda d_out, d_in: math.sqrt(d_out / d_in),
    "original": lambda d_out, d_in: math.sqrt(max(1, d_out / d_in)),
}
ITERATION_DTYPES: tuple[str, ...] = get_args(IterationDtype)


def muon_update(
    grads: list[Tensor],  # each (d_out, d_in), or its local rows
    momentum_buffers: list[Tensor],  # like grads, updated in place
    *,
    momentum: float,
    nesterov: bool,
    adjust_lr: AdjustLR,
    qkv_blocks: int,
    ns_steps: int,
    ns_coefficients: NSCoefficients,
    ns_dtype: IterationDtype,
    backend: Backend = "auto",
    matrices: Matrices | None = None,
) -> list[Tensor]:  # like grads
    """Return Muon's update of many matrices: orthogonalized momentum times its `adjust_lr` factor.

    Args:
        matrices: the layout of the weights over processes. Defaults to unsharded weights.
        others: see `Muon`. The factor is that of one block, (d_out / qkv_blocks, d_in).

    Source: Jordan et al., Muon (2024), kellerjordan.github.io/posts/muon.
    """
    directions = momentum_directions(grads, momentum_buffers, momentum=momentum, nesterov=nesterov)
    matrices = matrices or Matrices(grads, None)
    work = partial(
        orthogonalize_all,
        qkv_blocks=qkv_blocks,
        steps=ns_steps,
        ns_coefficients=ns_coefficients,
        ns_dtype=ns_dtype,
        backend=backend,
    )
    updates = matrices.by_owners([*directions], work)
    factor = ADJUST_LR[adjust_lr]
    factors = [factor(d_out // qkv_blocks, d_in) for d_out, d_in in matrices.shapes]
    torch._foreach_mul_(updates, factors)  # pyright: ignore
    return updates


def momentum_directions(
    grads: list[Tensor], momentum_buffers: list[Tensor], *, momentum: float, nesterov: bool
) -> Sequence[Tensor]:
    """Update m <- momentum·m + (1 - momentum)·grad in place and return m, for every pair.

    With `nesterov`, return the same average of the new m and grad again, without storing it. With
    momentum 0, m and the result are grad.
    """
    torch._foreach_lerp_(momentum_buffers, grads, 1 - momentum)  # pyright: ignore
    if not nesterov:
        return momentum_buffers
    return torch._foreach_lerp(grads, momentum_buffers, momentum)  # pyright: ignore


def orthogonalize_all(
    matrices: list[Tensor],  # each (d_out, d_in)
    *,
    qkv_blocks: int,
    steps: int,
    ns_coefficients: NSCoefficients,
    ns_dtype: IterationDtype,
    backend: Backend = "auto",
) -> list[Tensor]:  # new tensors, like matrices
    """Orthogonalize each of the `qkv_blocks` equal row blocks of each matrix.

    Matrices of equal shape are iterated as one batch.
    """
    same_shape: dict[Any, list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        same_shape[matrix.shape, matrix.dtype, matrix.device].append(i)
    result = list(matrices)
    for (shape, _, _), indices in same_shape.items():
        d_out, d_in = shape
        batch = torch.stack([matrices[i] for i in indices])  # (n, d_out, d_in)
        batch = batch.view(-1, d_out // qkv_blocks, d_in)  # (n·qkv_blocks, d_out/qkv_blocks, d_in)
        dtype = iteration_dtype(ns_dtype, batch.device)
        implementation = _choose_orthogonalize(backend, batch, dtype)
        batch = implementation(batch, steps=steps, ns_coefficients=ns_coefficients, dtype=dtype)
        for i, matrix in zip(indices, batch.reshape(-1, d_out, d_in), strict=True):
            result[i] = matrix
    return result


def iteration_dtype(ns_dtype: IterationDtype, device: torch.device) -> torch.dtype:
    """Return the dtype that `ns_dtype` names; "auto" is float32 on a CPU and bfloat16 elsewhere.

    CPUs without instructions for bfloat16 multiply it many times more slowly than float32.
    """
    if ns_dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.float32 if ns_dtype == "float32" else torch.bfloat16


def _choose_orthogonalize(backend: Backend, G: Tensor, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return the implementation of `orthogonalize` that `backend` selects for G (..., m, n)."""
    row_bytes = [size * dtype.itemsize for size in G.shape[-2:]]  # of X and of X Xᵀ
    if choose_backend(backend, "orthogonalize", G, row_bytes=row_bytes) == "torch":
        return orthogonalize
    from .kernels._triton_newton_schulz import orthogonalize as triton_orthogonalize

    return triton_orthogonalize


class MatrixOptimizer(DecoupledOptimizer):
    """Base class of Muon and AdaMuon: a DecoupledOptimizer for matrices that orthogonalizes.

    `backend` and `process_group` describe the machine, not the training, so they are not in the
    param groups or the `state_dict`. A copy of the optimizer keeps `backend` but no process group.
    """

    _process_group: ProcessGroup | None = None

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        backend: Backend,
        process_group: ProcessGroup | None,
    ) -> None:
        self.backend: Backend = backend  # super().__init__ calls `check_group`, which reads it
        self._layouts = Layouts()
        super().__init__(params, defaults)
        self._process_group = process_group

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(renamed_group(param_group))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = [renamed_group(group) for group in state_dict["param_groups"]]
        super().load_state_dict(state_dict | {"param_groups": groups})

    def settings(self, params: list[Tensor], group: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments that `muon_update` and `adamuon_update` share."""
        keys = ("momentum", "nesterov", "qkv_blocks", "ns_steps", "ns_coefficients", "ns_dtype")
        matrices = self._layouts.of(params, self._process_group)
        return {key: group[key] for key in keys} | {"backend": self.backend, "matrices": matrices}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._layouts = Layouts()
        super().__setstate__(state)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"backend": self.backend}

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_backend(self.backend, group["params"])
        class_name, qkv_blocks = type(self).__name__, group["qkv_blocks"]
        for key in ("qkv_blocks", "ns_steps"):
            if not (isinstance(group[key], int) and group[key] >= 1):
                raise ValueError(
                    f"{class_name}: {key}={group[key]}: must be an integer, at least 1"
                )
        for key, choices in (("ns_coefficients", NS_COEFFICIENTS), ("ns_dtype", ITERATION_DTYPES)):
            self.check_choice(group, key, choices)
        for name, param in named_params(group):
            if param.ndim != 2:
                raise ValueError(
                    f"{class_name} only supports 2D parameters; {name} is {tuple(param.shape)}; "
                    "pass it to another optimizer, for example torch.optim.AdamW"
                )
            if param.shape[0] % qkv_blocks:
                raise ValueError(
                    f"{class_name}: {name} is {tuple(param.shape)}: the number of rows must be "
                    f"divisible by qkv_blocks={qkv_blocks}"
                )

    def check_choice(self, group: dict[str, Any], key: str, choices: Any) -> None:
        """Raise ValueError unless group[key] is one of `choices`."""
        if not (isinstance(group[key], str) and group[key] in choices):
            raise ValueError(
                f"{type(self).__name__}: {key}={group[key]!r}: must be one of {', '.join(choices)}"
            )


class Muon(MatrixOptimizer):
    """W <- (1 - lr·weight_decay) W - lr·lr_mult·factor·orthogonalize(momentum).

    Args:
        params: 2-D parameters (d_out, d_in). A param group with `qkv_blocks=3` holds fused weights,
            such as q, k and v stacked by rows; each block is orthogonalized and scaled separately.
        momentum, nesterov: see `momentum_directions`; momentum in [0, 1).
        adjust_lr: the factor on the orthogonal update. "original" and "match_rms_adamw" are named
            as in torch.optim.Muon, "unit_rms_norm" as in NVIDIA's Emerging-Optimizers.
            "match_rms_adamw": 0.2·√max(d_out, d_in), which gives the update the RMS of a typical
            AdamW update, so that AdamW's lr and weight decay can be reused (Liu et al., arXiv
            2502.16982). "unit_rms_norm": √(d_out/d_in), which changes outputs by an RMS that does
            not depend on the width. "original": √max(1, d_out/d_in).
        ns_steps, ns_coefficients: number of steps and coefficients of the iteration; see
            `orthogonalize` in kernels/newton_schulz.py.
        ns_dtype: dtype of the iteration: "bfloat16", "float32", or "auto", which is float32 on a
            CPU and bfloat16 elsewhere.
        backend: "auto", "torch" or "triton"; see `choose_backend` in kernels/dispatch.py.
        process_group: the processes that store the same parameters (DDP) and share the
            orthogonalization. If None, every process orthogonalizes all parameters. Sharded
            parameters (FSDP2) bring their own group.
    Raises:
        ValueError: if a setting is out of range, a parameter is not 2-D, not divisible into its
            blocks or complex, a gradient is sparse, or the backend cannot run.

    adjust_lr="original" with ns_coefficients="quintic" equals torch.optim.Muon up to rounding.
    """

    buffers = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        adjust_lr: AdjustLR = "match_rms_adamw",
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
            "adjust_lr": adjust_lr,
            "qkv_blocks": 1,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "ns_dtype": ns_dtype,
        }
        super().__init__(params, renamed_group(defaults), backend, process_group)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        self.check_choice(group, "adjust_lr", ADJUST_LR)

    def updates(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        return muon_update(
            [local(p.grad) for p in params],
            [local(self.state[p]["momentum_buffer"]) for p in params],
            adjust_lr=group["adjust_lr"],
            **self.settings(params, group),
        )
