"""How something happens just before the steps of optimizers that belong to someone else."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

STEP = Optimizer.profile_hook_step(lambda: None).__code__  # what torch puts around every `step`


def parameters(optimizer: Optimizer) -> set[Tensor]:
    """All parameters that `optimizer` holds now."""
    return {param for group in optimizer.param_groups for param in group["params"]}


def check_optimizers(optimizers: Sequence[Optimizer], weights: dict[str, Tensor]) -> None:
    """Raise unless every weight, by the name of its layer, is in exactly one of the optimizers.

    TypeError for what is no optimizer or has no hooks, ValueError for the weights, all listed, and
    for a wrapper of the optimizer that steps them.
    """
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer")
        _check_steps_itself(optimizer, set(weights.values()))
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


def _check_steps_itself(optimizer: Optimizer, weights: set[Tensor]) -> None:
    """Raise for a wrapper (SAM, Lookahead), whose own `step` need not be called, or have hooks."""
    kind = type(optimizer)
    for key, inner in vars(optimizer).items():
        if isinstance(inner, Optimizer) and weights & parameters(inner):
            raise ValueError(f"{kind.__name__} steps its {key}; attach that one")
    is_hooked = getattr(kind.step, "hooked", False)
    if not is_hooked or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"{kind.__name__} has no step hooks: it does not call Optimizer.__init__. If it wraps "
            "another optimizer, attach that one"
        )


class RegisteredParams:
    """The weights that optimizers hold, by the names of their layers, when they are attached."""

    def __init__(self, optimizers: Sequence[Optimizer], weights: dict[str, Tensor]) -> None:
        self._optimizers, self._weights = optimizers, weights

    def check(self, weights: dict[str, Tensor]) -> None:
        """RuntimeError if a weight has taken another's place, and none of the optimizers holds it.

        It would be trained, if at all, without anybody noticing that it is not preconditioned.
        """
        new = {name: w for name, w in weights.items() if w is not self._weights[name]}
        held = {param for each in self._optimizers for param in parameters(each)} if new else set()
        if lost := [f"{name}.weight" for name, w in new.items() if w not in held]:
            raise RuntimeError(
                f"{', '.join(lost)}: another Parameter than at attach, and in none of the attached "
                "optimizers. Shard the model (FSDP2) before the optimizer is made and attached; "
                "after a forward without a backward, call model.reshard() before the step"
            )


def is_nested(optimizer: Optimizer) -> bool:
    """Whether the step that begins was called by another step of the same optimizer.

    The stack tells. A mark that a post hook takes away would outlive a step that raises.
    """
    n_steps, frame = 0, sys._getframe()
    while frame := frame.f_back:
        n_steps += frame.f_code is STEP and frame.f_locals["args"][0] is optimizer
    return n_steps > 1


def call_before_step(
    optimizer: Optimizer, function: Callable[[Optimizer], None]
) -> RemovableHandle:
    """From now on `function(optimizer)` runs before every step, when the gradients are there.

    With a closure, that is after the closure, which may then be called once a step. A `step` that
    calls its parent's, which has hooks, too, is one step.
    """
    has_run = False  # in the step that is under way

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
        wrapped = _followed_by(once, closure, optimizer)
        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, kwargs | {"closure": wrapped}

    return optimizer.register_step_pre_hook(hook)


def call_before_steps(
    optimizers: Sequence[Optimizer], function: Callable[[Optimizer], None]
) -> list[RemovableHandle]:
    """The same for several optimizers: for all of them, or after an error for none."""
    hooks = []
    try:
        for optimizer in optimizers:
            hooks.append(call_before_step(optimizer, function))
    except Exception:
        for hook in hooks:
            hook.remove()
        raise
    return hooks


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


class PreconditionedGrads:
    """The gradients that were replaced by M, each with what it was like then.

    The version of a gradient tells, which all that is added later advances. What is written through
    `.data` does not advance it: the count of captured tokens tells that, in steps that collect.
    """

    def __init__(self) -> None:
        self._seen = WeakTensorKeyDictionary()  # gradient: its version, the tokens captured

    def add(self, gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
        """These (gradient, count) are M now; all of a step at once.

        Gradients that are views of one buffer share a version: it has to be read after the last.
        """
        for grad, count in gradients:
            self._seen[grad] = grad._version, count.clone()

    def is_done(self, grad: Tensor | None, count: Tensor) -> bool:
        """Whether nothing came after M. The host reads `count` only if versions agree: rarely."""
        if grad is None or grad not in self._seen:
            return False
        version, seen = self._seen[grad]
        return grad._version == version and bool(seen == count)

    def nothing_captured(self) -> None:
        """The counts of all layers were set to zero without a step."""
        for _, count in self._seen.values():
            count.zero_()
