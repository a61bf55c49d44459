"""The base class of Signum, Muon and AdaMuon: everything except their update rules."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .process_group import local


class DecoupledOptimizer(torch.optim.Optimizer):
    """W <- (1 - lr·weight_decay) W - lr·lr_mult·update, for every parameter with a gradient.

    A parameter without elements is left alone.

    `lr_mult` is a key of a param group (default 1). It scales the update but not the decay. Use it
    for factors that depend on the width, so that lr·weight_decay does not.

    A subclass lists the names of its state tensors in `buffers`; they start as zeros of the
    parameter's shape and dtype. It computes the updates in `updates`.

    Raises:
        ValueError: if a number is out of range, a parameter is complex, or a gradient is sparse. In
            this case nothing has changed.
    """

    buffers: tuple[str, ...] = ()

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, {"lr_mult": 1.0, **defaults})

    def updates(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Return one update per parameter of a group and advance `self.state`.

        `self.state` of each parameter holds the tensors of `buffers`. The update of a DTensor is
        that of its local part.
        """
        raise NotImplementedError

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError if the settings or parameters of a group are not supported."""
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(group['lr'].shape)}")
        for key in ("lr", "weight_decay", "lr_mult"):
            self.check_number(group, key, 0, math.inf)
        self.check_number(group, "momentum", 0, 1)
        for name, param in named_params(group):
            if param.is_complex():
                raise ValueError(f"{type(self).__name__} does not support complex: {name}")

    def check_number(self, group: dict[str, Any], key: str, low: float, high: float) -> None:
        """Raise ValueError unless group[key] is in [low, high)."""
        if not low <= float(group[key]) < high:
            raise ValueError(
                f"{type(self).__name__}: {key}={group[key]}: must be in [{low}, {high})"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self.check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step.

        Args:
            closure: reevaluates the model, computes the gradients and returns the loss.
        Returns:
            The loss that `closure` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse_gradients()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            for param in params:
                self._init_state(param)
            if params:
                self._apply(params, self.updates(params, group), group)
        return loss

    def _refuse_sparse_gradients(self) -> None:
        for group in self.param_groups:
            sparse = [p for p in group["params"] if p.grad is not None and p.grad.is_sparse]
            if sparse:
                name = next(name for name, param in named_params(group) if param is sparse[0])
                raise ValueError(f"{type(self).__name__} does not support sparse: {name}")

    def _init_state(self, param: Tensor) -> None:
        state = self.state[param]
        for name in self.buffers:
            if name not in state:
                state[name] = torch.zeros_like(param)

    def _apply(self, params: list[Tensor], updates: list[Tensor], group: dict[str, Any]) -> None:
        lr, weights = float(group["lr"]), [local(param) for param in params]
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])  # pyright: ignore
        torch._foreach_add_(weights, updates, alpha=-lr * group["lr_mult"])  # pyright: ignore


def named_params(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Return (name, parameter) pairs of a param group; unnamed parameters are named by shape."""
    params = group["params"]
    names = group.get("param_names") or [f"a parameter of shape {tuple(p.shape)}" for p in params]
    return list(zip(names, params, strict=True))
