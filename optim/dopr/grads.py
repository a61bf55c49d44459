"""Follow the gradients of the covered weights from the backward to the step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from .layer import Layer, log


class FormedGrads:
    """Know which weights got a gradient from a backward since their last step.

    A step without any is the empty step that torch.distributed.checkpoint takes to create the
    optimizer's state. A gradient that is replaced by another one before a step was thrown away,
    but its tokens were counted; this is logged once.
    """

    def __init__(self, layers: Sequence[Layer], is_paused: Tensor) -> None:
        self._is_paused = is_paused
        self._formed: dict[Layer, tuple[TensorWeakRef, bool]] = {}  # the gradient, is it in Σ
        self._has_warned = False
        self.hooks: list[RemovableHandle] = [self._watch(layer) for layer in layers]

    def _watch(self, layer: Layer) -> RemovableHandle:
        def formed(weight: Tensor) -> None:
            if (grad := weight.grad) is None:
                return
            earlier, was_counted = self._formed.get(layer, (None, False))
            if was_counted and earlier is not None and earlier() is not grad:
                self._warn(layer)
            # With create_graph, torch accumulates out of place, so every gradient is a new tensor.
            is_counted = layer.capture.is_collecting and not self._is_paused
            is_counted = bool(is_counted) and not grad.requires_grad
            self._formed[layer] = TensorWeakRef(grad), is_counted

        return layer.covered.weight.register_post_accumulate_grad_hook(formed)

    def _warn(self, layer: Layer) -> None:
        if not self._has_warned:
            log.warning(
                "%s: a gradient was removed before a step, but the tokens that formed it stay in "
                "Σ. If it was thrown away, run its backward inside paused(), or call discard() "
                "when you skip a step",
                layer.label,
            )
        self._has_warned = True

    def any(self, layers: Iterable[Layer]) -> bool:
        """Return whether a backward formed the gradient of one of these layers."""
        return any(layer in self._formed for layer in layers)

    def clear(self, layers: Iterable[Layer]) -> None:
        """Forget the gradients of these layers, after their step."""
        for layer in layers:
            self._formed.pop(layer, None)


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
