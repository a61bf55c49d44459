"""Follow the gradients of the covered weights from the backward to the step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from ..process_group import local, n_processes
from .layer import Layer, log


class FormedGrads:
    """Record which weights received a gradient from a backward since their last step.

    If no weight received one, the step is empty: torch.distributed.checkpoint takes such a step to
    create the optimizer's state. A gradient that is replaced by another one before a step was
    removed, although its tokens were counted. This is logged once, in a single process only,
    because DDP itself replaces gradients.
    """

    def __init__(self, is_paused: Tensor) -> None:
        self._is_paused = is_paused
        # The gradient, and whether its backward ran outside `paused()`.
        self._formed: dict[Layer, tuple[TensorWeakRef, bool]] = {}
        self._has_warned = False

    def watch(self, layer: Layer) -> RemovableHandle:
        """Record every gradient of a layer's weight until the returned hook is removed."""
        # The weight holds the hook, so the hook must not hold what holds the weight.
        owner, watched = weakref.ref(self), weakref.ref(layer)

        def formed(weight: Tensor) -> None:
            grads, layer = owner(), watched()
            if grads is not None and layer is not None and weight.grad is not None:
                grads._note(layer, weight.grad)

        return layer.covered.weight.register_post_accumulate_grad_hook(formed)

    def _note(self, layer: Layer, grad: Tensor) -> None:
        earlier, was_counted = self._formed.get(layer, (None, False))
        # With create_graph, torch accumulates out of place, so every gradient is a new tensor.
        is_new = earlier is not None and earlier() is not grad and not grad.requires_grad
        if was_counted and is_new and layer.capture.is_collecting:
            self._warn(layer)
        self._formed[layer] = TensorWeakRef(grad), not self._is_paused

    def _warn(self, layer: Layer) -> None:
        if not self._has_warned and n_processes() == 1:
            log.warning(
                "%s: a gradient was removed before a step. If you added it up elsewhere, ignore "
                "this. If you threw it away, its tokens are still in Σ: run such a backward inside "
                "paused(), or call discard() when you skip a step",
                layer.label,
            )
        self._has_warned = True

    def any(self, layers: Iterable[Layer]) -> bool:
        """Return whether a backward formed the gradient of one of these layers."""
        return any(layer in self._formed for layer in layers)

    def raw(self) -> list[Layer]:
        """Return the layers whose gradient, of a backward outside `paused()`, is still G."""
        formed = [layer for layer, (_, is_counted) in self._formed.items() if is_counted]
        return [layer for layer in formed if layer.covered.weight.grad is not None]

    def clear(self, layers: Iterable[Layer]) -> None:
        """Forget the gradients of these layers, after their step."""
        for layer in layers:
            self._formed.pop(layer, None)


class PreconditionedGrads:
    """Track gradients that were already preconditioned.

    A second step() without backward() leaves such gradients as they are. A gradient counts as
    unchanged if its version and its layer's token count are the same. A write through `.data` does
    not change the version, but a backward that collects tokens changes the count. Without either,
    the write is not noticed.
    """

    def __init__(self) -> None:
        self._seen = WeakTensorKeyDictionary()  # gradient: (its versions, its layer's token count)

    def add(self, gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Record all (gradient, token count) pairs of a step in one call.

        Gradients that are views of one buffer share a version counter, so it has to be read after
        the last of them was written.
        """
        for grad, count in gradients:
            self._seen[grad] = _versions(grad), count.clone()

    def is_unchanged(self, grad: Tensor | None, count: Tensor) -> bool:
        """Return whether `grad` is still M. Synchronizes with the device only if versions agree."""
        if grad is None or grad not in self._seen:
            return False
        versions, seen_count = self._seen[grad]
        return _versions(grad) == versions and bool(seen_count == count)

    def reset_counts(self) -> None:
        """Set the recorded token counts to zero, after the captures were cleared without a step."""
        for _, count in self._seen.values():
            count.zero_()


def _versions(grad: Tensor) -> tuple[int, int]:
    """Return the versions of a DTensor and of its local part: a write may change either."""
    return grad._version, local(grad)._version
