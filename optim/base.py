"""What Signum, Muon and AdaMuon share: everything around their update rules."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .process_group import local


class DecoupledOptimizer(torch.optim.Optimizer):
    """W <- (1 - lr·weight_decay) W - lr·lr_mult·update, for every parameter with a gradient.

    `lr_mult` (a key of a param group, default 1) scales the update and leaves the decay alone: a
    rule of width belongs there, and lr·weight_decay then does not depend on it.

    A subclass names its state in `buffers` (zeros of the parameter's shape and dtype at first) and
    returns the updates of some parameters of one group from `updates`.

    Raises:
        ValueError: a number outside its range, a complex parameter, a sparse gradient. Nothing was
            changed then.
    """

    buffers: tuple[str, ...] = ()

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, {"lr_mult": 1.0, **defaults})

    def updates(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """One update per parameter; `self.state` of the parameters is ready, and is advanced.

        Of a DTensor, the update of the part that is in this process.
        """
        raise NotImplementedError

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for settings or parameters that this optimizer cannot work with."""
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(group['lr'].shape)}")
        for key in ("lr", "weight_decay", "lr_mult"):
            self.check_number(group, key, 0, math.inf)
        self.check_number(group, "momentum", 0, 1)
        for name, param in named_params(group):
            if param.is_complex():
                raise ValueError(f"{type(self).__name__} does not support complex: {name}")

    def check_number(self, group: dict[str, Any], key: str, low: float, below: float) -> None:
        if not low <= float(group[key]) < below:
            raise ValueError(
                f"{type(self).__name__}: {key}={group[key]}: must be in [{low}, {below})"
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
        """One step; returns what `closure`, which may recompute loss and gradients, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse_gradients()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                self._init_state(param)
            self._apply(params, self.updates(params, group), group)
        return loss

    def _refuse_sparse_gradients(self) -> None:
        for group in self.param_groups:
            for name, param in named_params(group):
                if param.grad is not None and param.grad.is_sparse:
                    raise ValueError(f"{type(self).__name__} does not support sparse: {name}")

    def _init_state(self, param: Tensor) -> None:
        state = self.state[param]
        for name in self.buffers:
            if name not in state:
                state[name] = torch.zeros_like(param)

    def _apply(self, params: list[Tensor], updates: list[Tensor], group: dict[str, Any]) -> None:
        lr = float(group["lr"])
        for param, update in zip(map(local, params), updates, strict=True):
            param.mul_(1 - lr * group["weight_decay"])
            param.add_(update, alpha=-lr * group["lr_mult"])


def named_params(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """(name, parameter) of a param group; a parameter without a name is called by its shape."""
    params = group["params"]
    names = group.get("param_names") or [f"a parameter of shape {tuple(p.shape)}" for p in params]
    return list(zip(names, params, strict=True))
