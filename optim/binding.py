"""How something happens just before the steps of optimizers that belong to someone else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


def parameters(optimizer: Optimizer) -> set[Tensor]:
    """All parameters that `optimizer` holds now."""
    return {param for group in optimizer.param_groups for param in group["params"]}


def check_optimizers(optimizers: Sequence[Optimizer], weights: dict[str, Tensor]) -> None:
    """Raise unless every weight, by the name of its layer, is in exactly one of the optimizers.

    TypeError for what is no optimizer, ValueError for the weights, all listed, RuntimeError where
    several processes train together.
    """
    is_parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    if is_parallel and torch.distributed.get_world_size() > 1:
        raise RuntimeError("Σ is summed in one process only: every rank would differ")
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer")
    owners = Counter(param for each in optimizers for param in parameters(each))
    wrong = [
        f"{name}.weight is in {owners[weight]}"
        for name, weight in weights.items()
        if owners[weight] != 1
    ]
    if wrong:
        raise ValueError(
            "every covered weight must be in exactly one of the optimizers: "
            + "; ".join(wrong)
            + ". Attach all optimizers in one call, or exclude these layers"
        )


def call_before_step(
    optimizer: Optimizer, function: Callable[[Optimizer], None]
) -> RemovableHandle:
    """From now on `function(optimizer)` runs before every step, when the gradients are there.

    With a closure, that is after the closure, which may then be called once a step.
    """

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            function(optimizer)
            return None
        wrapped = _followed_by(function, closure, optimizer)
        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, kwargs | {"closure": wrapped}

    return optimizer.register_step_pre_hook(hook)


def _followed_by(
    function: Callable[[Optimizer], None], closure: Callable[[], Any], optimizer: Optimizer
) -> Callable[[], Any]:
    """The closure, then `function`; an error at the second call in a step."""
    n_calls = 0

    def wrapped() -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls > 1:
            raise RuntimeError(
                f"{type(optimizer).__name__} calls its closure several times a step (a line "
                "search?), which activation preconditioning does not support"
            )
        loss = closure()
        function(optimizer)
        return loss

    return wrapped
