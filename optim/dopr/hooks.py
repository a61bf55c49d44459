"""Run a callback before `optimizer.step()` of any optimizer."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

# The code of the wrapper that torch puts around every `step`.
STEP_WRAPPER = Optimizer.profile_hook_step(lambda: None).__code__


def parameters(optimizer: Optimizer) -> set[Tensor]:
    """Return all parameters in the param groups of the optimizer."""
    return {param for group in optimizer.param_groups for param in group["params"]}


def check_optimizers(optimizers: Sequence[Optimizer], weights: dict[str, Tensor]) -> None:
    """Raise unless every weight, keyed by the name of its layer, is in exactly one optimizer.

    Raises:
        TypeError: if an object is not a torch.optim.Optimizer, or has no step hooks.
        ValueError: if weights are in no optimizer or in several (the message lists them all), or an
            object wraps the optimizer that steps them.
    """
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer")
        _check_not_a_wrapper(optimizer, set(weights.values()))
    owners = Counter(param for each in optimizers for param in parameters(each))
    problems = [
        f"{name}.weight is in {owners[weight]} of them"
        for name, weight in weights.items()
        if owners[weight] != 1
    ]
    if problems:
        raise ValueError(
            "every covered weight must be in exactly one of the optimizers, but "
            + "; ".join(problems)
            + ": attach all optimizers in one call, or exclude these layers"
        )


def _check_not_a_wrapper(optimizer: Optimizer, weights: set[Tensor]) -> None:
    """Raise if the object wraps another optimizer (SAM, Lookahead), or its `step` runs no hooks."""
    kind = type(optimizer)
    for key, inner in vars(optimizer).items():
        if isinstance(inner, Optimizer) and weights & parameters(inner):
            raise ValueError(f"{kind.__name__} wraps another optimizer: attach its {key!r} instead")
    is_hooked = getattr(kind.step, "hooked", False)
    if not is_hooked or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"{kind.__name__} has no step hooks, because it does not call Optimizer.__init__: if "
            "it wraps another optimizer, attach that one instead"
        )


class RegisteredParams:
    """Remember the covered weights, keyed by layer name, that the attached optimizers hold."""

    def __init__(self, optimizers: Sequence[Optimizer], weights: dict[str, Tensor]) -> None:
        self._optimizers, self._weights = optimizers, weights

    def check(self, weights: dict[str, Tensor]) -> None:
        """Raise RuntimeError if a weight was replaced by a Parameter that no optimizer holds.

        Such a weight would silently go without preconditioning.
        """
        new = {name: w for name, w in weights.items() if w is not self._weights[name]}
        held = {param for each in self._optimizers for param in parameters(each)} if new else set()
        if lost := [f"{name}.weight" for name, w in new.items() if w not in held]:
            raise RuntimeError(
                f"{', '.join(lost)} was replaced after attach by a Parameter that no attached "
                "optimizer holds: shard the model (FSDP2) before you construct and attach the "
                "optimizer; after a forward without a backward, call model.reshard() before step()"
            )


def is_nested(optimizer: Optimizer) -> bool:
    """Return whether the current step was called from within a step of the same optimizer.

    Inspects the call stack. A flag that a post hook clears would survive a step that raises.
    """
    n_steps, frame = 0, sys._getframe()
    while frame := frame.f_back:
        n_steps += frame.f_code is STEP_WRAPPER and frame.f_locals["args"][0] is optimizer
    return n_steps > 1


def call_before_step(
    optimizer: Optimizer, function: Callable[[Optimizer], None]
) -> RemovableHandle:
    """Call `function(optimizer)` before every step, once the gradients have been computed.

    If `step` gets a closure, the call follows the closure, and the optimizer may call the closure
    only once per step. A `step` that calls the `step` of its parent class counts as one step.
    """
    has_run = False  # whether `function` has run in the current step

    def once(optimizer: Optimizer) -> None:
        nonlocal has_run
        if not has_run:
            function(optimizer)
            has_run = True

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal has_run
        has_run = has_run and is_nested(optimizer)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            once(optimizer)
            return None
        wrapped = _call_after(closure, once, optimizer)
        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, kwargs | {"closure": wrapped}

    return optimizer.register_step_pre_hook(hook)


def call_before_steps(
    optimizers: Sequence[Optimizer], function: Callable[[Optimizer], None]
) -> list[RemovableHandle]:
    """Register `call_before_step` for all optimizers, or for none of them if one fails."""
    hooks = []
    try:
        for optimizer in optimizers:
            hooks.append(call_before_step(optimizer, function))
    except Exception:
        for hook in hooks:
            hook.remove()
        raise
    return hooks


def _call_after(
    closure: Callable[[], Any], function: Callable[[Optimizer], None], optimizer: Optimizer
) -> Callable[[], Any]:
    """Return a closure that also calls `function`, and that raises if it is called again."""
    n_calls = 0

    def wrapped() -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls > 1:
            raise RuntimeError(
                f"{type(optimizer).__name__} calls its closure several times per step (a line "
                "search?), which activation preconditioning does not support"
            )
        loss = closure()
        function(optimizer)
        return loss

    return wrapped


class PreconditionedGrads:
    """Track gradients that were already preconditioned.

    A second step() without backward() leaves such gradients as they are. Unchanged means the same
    version and the same token count. A write through `.data` leaves the version; the count, raised
    by a collecting backward, catches it.
    """

    def __init__(self) -> None:
        self._seen = WeakTensorKeyDictionary()  # gradient: (its version, its layer's token count)

    def add(self, gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Record all (gradient, token count) pairs of a step in one call.

        Gradients that are views of one buffer share a version counter, so it has to be read after
        the last of them was written.
        """
        for grad, count in gradients:
            self._seen[grad] = grad._version, count.clone()

    def is_unchanged(self, grad: Tensor | None, count: Tensor) -> bool:
        """Return whether `grad` is still M. Synchronizes with the device only if versions agree."""
        if grad is None or grad not in self._seen:
            return False
        version, seen_count = self._seen[grad]
        return grad._version == version and bool(seen_count == count)

    def reset_counts(self) -> None:
        """Set the recorded token counts to zero, after the captures were cleared without a step."""
        for _, count in self._seen.values():
            count.zero_()
