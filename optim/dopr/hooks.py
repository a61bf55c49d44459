"""Run callbacks around `optimizer.step()` of any optimizer."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from .grads import FormedGrads
from .optimizers import REATTACH, parameters

# The code of the wrapper that torch puts around every `step`.
STEP_WRAPPER = Optimizer.profile_hook_step(lambda: None).__code__


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
                f"{', '.join(lost)} was replaced after attach by a tensor that no attached "
                "optimizer holds: construct and attach the optimizer after fully_shard (FSDP2) and "
                "after load_state_dict(assign=True); after a forward of FSDP2 without a "
                "backward, call model.reshard() before step(); after pruning or "
                "reparametrizing it, construct and attach a new preconditioner"
            )


class OtherSteps:
    """Warn once if an optimizer that is not attached steps a covered weight with its G."""

    def __init__(self, attached: Sequence[Optimizer], formed_grads: FormedGrads) -> None:
        self._attached, self._formed_grads = {*attached}, formed_grads
        self._has_warned = False

    def watch(self) -> RemovableHandle:
        """Examine every step of any optimizer until the returned hook is removed."""
        while _DROPPED:
            _DROPPED.pop().remove()
        watcher = weakref.ref(self)  # torch holds the hook for as long as the process lives

        def stepped(optimizer: Optimizer, *_: Any) -> None:
            steps = watcher()
            if steps is not None and optimizer not in steps._attached and not steps._has_warned:
                steps._examine(optimizer)

        hook = register_optimizer_step_post_hook(stepped)
        weakref.finalize(self, _DROPPED.append, hook)
        return hook

    def _examine(self, optimizer: Optimizer) -> None:
        if not (raw := self._formed_grads.raw()):
            return
        held = parameters(optimizer)
        if names := [layer.label for layer in raw if layer.covered.weight in held]:
            self._has_warned = True
            warnings.warn(
                f"{type(optimizer).__name__} is not attached and updated {names[0]}.weight by a "
                f"gradient that is not preconditioned: {REATTACH}",
                RuntimeWarning,
                stacklevel=4,  # the call of step()
            )


# Hooks of preconditioners that were dropped without detach(). They are not removed at once, because
# the garbage collector may run while torch iterates over the hooks.
_DROPPED: list[RemovableHandle] = []


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
    only once per step. A first argument that is not callable is no closure and is passed on. A
    `step` that calls the `step` of its parent class counts as one step.
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
        if not callable(closure):
            once(optimizer)
            return None
        wrapped = _call_after(closure, once, optimizer)
        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, kwargs | {"closure": wrapped}

    return optimizer.register_step_pre_hook(hook)


def call_around_steps(
    optimizers: Sequence[Optimizer],
    before: Callable[[Optimizer], None],
    after: Callable[[], None],
) -> list[RemovableHandle]:
    """Call `before(optimizer)` before and `after()` after every step, or raise and register none.

    `after` is not called if the step raises.
    """
    hooks = []
    try:
        for optimizer in optimizers:
            hooks.append(call_before_step(optimizer, before))
            hooks.append(optimizer.register_step_post_hook(lambda *_: after()))
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
