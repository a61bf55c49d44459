"""Decide which running sums a refresh can use, and handle the others: unseen, zero, not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..process_group import Collective
from .distributed import Sums
from .layer import Layer


def with_usable_sums(layers: list[Layer], sums: Sums, collective: Collective) -> list[Layer]:
    """Return the layers whose running sum can be used; handle the others.

    Synchronizes with the device once for all layers, and in `with_gradient`. Token counts and mean
    eigenvalues are enough: because |z_i z_j| <= (z_i² + z_j²) / 2, the sum of z zᵀ is zero or
    finite if its mean eigenvalue is.
    """
    sums.check_order()
    unseen, not_finite, zero, usable = [], [], [], []
    for layer, (count, mean) in zip(layers, sums.counts_and_mean_eigenvalues, strict=False):
        if not math.isfinite(mean):
            not_finite.append(layer)
        elif count == 0:
            unseen.append(layer)
        elif mean == 0:
            zero.append(layer)
        else:
            usable.append(layer)
    _handle_unseen(unseen, collective)
    _drop_not_finite(not_finite)
    _drop_zero(zero, collective)
    return usable


def _handle_unseen(layers: list[Layer], collective: Collective) -> None:
    """Handle layers without tokens: one that has no gradient was not used in this step.

    If a layer has a gradient, count a fallback if all its sampled tokens were masked. Raise
    RuntimeError if no process captured it: its capture does not work.
    """
    without_tokens = with_gradient(layers, collective)
    captured = _chosen(without_tokens, [each.was_seen for each in without_tokens], collective)
    if missed := [layer for layer in without_tokens if layer not in captured]:
        names = [layer.name or layer.covered.full_name for layer in missed]
        others = f" (and {len(names) - 1} more layers)" if names[1:] else ""
        raise RuntimeError(
            f"{missed[0].label} has a gradient but its input activations were not seen{others}. "
            "Likely causes: its forward is bypassed (F.linear on its weight, a fused or functional "
            "call), or was traced, exported or replaced; every backward ran inside paused(), ran "
            "before the preconditioner was constructed, or was followed by discard(); the gradient "
            f"was set by hand. To leave out layers that are never seen, pass exclude={names}"
        )
    _count_fallbacks(captured, "all sampled tokens are masked")


def _drop_not_finite(layers: list[Layer]) -> None:
    """Drop sums that are not finite and keep the last P. Raise if a layer has no P yet."""
    for layer in layers:
        layer.capture.clear()
    if first := [layer.label for layer in layers if layer.n_refreshes == 0]:
        raise FloatingPointError(
            f"the first activations seen by {', '.join(first)} are not finite: look for the cause "
            "in the data or the model; if you skipped the step that saw them, call discard() then"
        )
    for layer in layers:
        layer.count_fallback("activations are not finite; the last P is kept")


def _drop_zero(layers: list[Layer], collective: Collective) -> None:
    """Drop sums that are zero. If the layer has a gradient all the same, count a fallback."""
    for layer in layers:
        layer.capture.clear()
    _count_fallbacks(with_gradient(layers, collective), "all sampled activations are zero")


def _count_fallbacks(layers: list[Layer], reason: str) -> None:
    for layer in layers:
        remedy = "the last P is kept" if layer.n_refreshes else "the gradient is left as it is"
        layer.count_fallback(f"{reason}; {remedy}")


def with_gradient(layers: list[Layer], collective: Collective) -> list[Layer]:
    """Return the layers with a nonzero gradient in some process.

    Synchronizes with the device once. All processes must pass the same layers, because a gradient
    may exist in some of them only.
    """
    grads = [layer.covered.grad for layer in layers]
    flags = [torch.zeros((), dtype=torch.bool) if g is None else g.any() for g in grads]
    return _chosen(layers, flags, collective)


def _chosen(layers: list[Layer], flags: list[Tensor], collective: Collective) -> list[Layer]:
    """Return the layers whose flag is set in some process."""
    if not layers:
        return []
    device = layers[0].sigma.device
    n_set = collective.sum_(torch.stack([flag.to(device) for flag in flags]).long())
    return [layer for layer, n in zip(layers, n_set.tolist(), strict=True) if n]
