"""Find the torch optimizers in what a trainer hands over, and check that they can be attached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..process_group import n_processes
from .layer import log

# Wrappers whose step() calls that of the optimizer they hold: class name -> attribute.
TRANSPARENT = {"AcceleratedOptimizer": "optimizer", "LightningOptimizer": "_optimizer"}

REATTACH = (
    "take state_dict(), call detach(), construct a new preconditioner, attach all optimizers to it "
    "in one call, and give it the state by load_state_dict()"
)


def parameters(optimizer: Optimizer) -> set[Tensor]:
    """Return all parameters in the param groups of the optimizer."""
    return {param for group in optimizer.param_groups for param in group["params"]}


def unwrapped(optimizers: Any) -> Iterator[Any]:
    """Yield the optimizers in lists, in containers (torchtitan's) and in wrappers of trainers.

    Containers are objects with a list `optimizers`. Wrappers are those of accelerate and Lightning.
    """
    name = type(optimizers).__name__
    if isinstance(optimizers, (list, tuple)):
        parts = list(optimizers)
    elif name in TRANSPARENT:
        parts = [getattr(optimizers, TRANSPARENT[name])]
    elif isinstance(getattr(optimizers, "optimizers", None), (list, tuple)):
        parts = list(optimizers.optimizers)
    else:
        yield optimizers
        return
    if not isinstance(optimizers, (list, tuple)):
        log.info("attaching the %d optimizer(s) inside %s", len(parts), name)
    for part in parts:
        yield from unwrapped(part)


def check_optimizers(optimizers: Sequence[Any], weights: dict[str, Tensor]) -> None:
    """Raise unless every weight, keyed by the name of its layer, is in exactly one optimizer.

    Raises:
        TypeError: if an object is not a torch.optim.Optimizer, or its step() cannot be hooked.
        ValueError: if weights are in no optimizer or in several (the message lists them all), or an
            object wraps the optimizer that steps them.
    """
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"{type(optimizer).__name__} is not a torch.optim.Optimizer: pass the optimizers, "
                "or a list of them"
            )
        _check_has_step(optimizer)
        _check_not_a_wrapper(optimizer, set(weights.values()))
    owners = Counter(param for each in optimizers for param in parameters(each))
    problems = [
        f"{name}.weight is in {owners[weight]} of them"
        for name, weight in weights.items()
        if owners[weight] != 1
    ]
    if problems:
        zero1 = "" if n_processes() == 1 else f". {_ZERO1}"
        raise ValueError(
            "every covered weight must be in exactly one of the optimizers, but "
            + "; ".join(problems)
            + f": attach all optimizers in one call, or exclude these layers{zero1}"
        )


_ZERO1 = (
    "ZeroRedundancyOptimizer (ZeRO-1) cannot be preconditioned, because each process steps only "
    "some of the weights: use fully_shard (FSDP2), or plain optimizers with DistributedDataParallel"
)


def _check_has_step(optimizer: Optimizer) -> None:
    """Raise TypeError if the optimizer does not update the weights in a step() that runs hooks."""
    kind = type(optimizer)
    if hasattr(optimizer, "fused_backward"):
        raise TypeError(
            f"{kind.__name__} updates the weights during the backward, before the gradient can be "
            "preconditioned: use an optimizer with a step(), such as AdamW or Adafactor"
        )
    is_hooked = getattr(kind.step, "hooked", False)
    if not is_hooked or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"{kind.__name__} has no step hooks, because it does not call Optimizer.__init__: if "
            "it wraps another optimizer, attach that one instead"
        )


def _check_not_a_wrapper(optimizer: Optimizer, weights: set[Tensor]) -> None:
    """Raise ValueError if the object wraps another optimizer (SAM, Lookahead, ZeRO-1)."""
    kind = type(optimizer)
    if kind.__name__ == "ZeroRedundancyOptimizer":
        raise ValueError(_ZERO1)
    for key, inner in vars(optimizer).items():
        if isinstance(inner, Optimizer) and weights & parameters(inner):
            raise ValueError(f"{kind.__name__} wraps another optimizer: attach its {key!r} instead")
