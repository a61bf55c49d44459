"""Correct M for the mean of a layer's inputs, which may be newer than P.

Σ = C + μ μᵀ, with the mean μ = E[z] and the centred covariance C. The inverse of Σ + γ̄ I follows
from K = (C + γ̄ I)^-1 by the formula of Sherman and Morrison:

    (C + μ μᵀ + γ̄ I)^-1 = K - (K μ) (K μ)ᵀ / (1 + μᵀ K μ)

So C and K may be some steps old while μ is that of the current step. It costs one sum of z per
backward, and a rank-one update of M per step. With several blocks, each has its own μ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.precision import full_precision
from ..process_group import Collective

if TYPE_CHECKING:
    from .layer import Layer


def centred(second_moment: Tensor, mean: Tensor) -> Tensor:
    """Return C = E[z zᵀ] - μ μᵀ of each block.

    Args:
        second_moment: (blocks, b, b).
        mean: (blocks, b).
    """
    return second_moment - mean[:, :, None] * mean[:, None, :]


def uncentred(C: Tensor, mean: Tensor) -> Tensor:
    """Return Σ = C + μ μᵀ of each block, the reverse of `centred`."""
    return C + mean[:, :, None] * mean[:, None, :]


def correct_for_mean(M: Tensor, P: Tensor, mean: Tensor, scale: Tensor | float) -> Tensor:
    """Return M = G P' for P' = s (C + μ μᵀ + γ̄ I)^-1, given G P for P = s (C + γ̄ I)^-1.

    Args:
        M: G P, (d_out, d_in); overwritten.
        P: (blocks, b, b).
        mean: μ, (blocks, b). If it is zero, M does not change.
        scale: s, the factor that P contains.
    """
    with full_precision(M.device.type):
        P_mean = torch.bmm(P, mean[:, :, None])[:, :, 0]  # (blocks, b)
        coefficient = P_mean / (scale + (mean * P_mean).sum(-1, keepdim=True))  # (blocks, b)
        for block, part in enumerate(M.split(mean.shape[1], dim=1)):  # (d_out, b)
            part.addr_(part @ mean[block], coefficient[block], alpha=-1)
    return M


def update_means(
    layers: Iterable[Layer], due: Iterable[Layer], collective: Collective
) -> dict[Layer, Tensor]:
    """Set μ of each layer to the mean over the sampled tokens of this step, in all processes.

    A layer without tokens, or with tokens that are not finite, keeps its μ. All processes must pass
    the same layers.

    Returns:
        For the layers in `due`, the mean over the tokens in their running sums of z zᵀ.
    """
    groups: dict[Any, list[Layer]] = defaultdict(list)
    for layer in layers:
        if layer.has_mean:
            groups[layer.sigma.dtype, layer.sigma.device].append(layer)
    gram_means: dict[Layer, Tensor] = {}
    for group in groups.values():
        gram_means |= _update_group(group, {*due}, collective)
    return gram_means


def _update_group(
    layers: list[Layer], due: set[Layer], collective: Collective
) -> dict[Layer, Tensor]:
    """Do what `update_means` does for layers of one dtype and device, with one reduction."""
    rows = [_sums(layer)[: 1 + (layer in due)] for layer in layers]  # (1 or 2, d + 1) each
    if collective.size > 1:
        buffer = collective.sum_(torch.cat([each.flatten() for each in rows]))
        parts = buffer.split([each.numel() for each in rows])
        rows = [part.view(each.shape) for part, each in zip(parts, rows, strict=True)]
    gram_means = {}
    for layer, row in zip(layers, rows, strict=True):
        means = (row[:, :-1] / row[:, -1:]).view(-1, *layer.mean.shape)
        layer.mean = torch.where(means[0].isfinite().all(), means[0], layer.mean)
        if layer in due:
            gram_means[layer] = means[1]
    return gram_means


def clear_step_sums(layers: Iterable[Layer]) -> None:
    """Set the sums of z over the tokens of a step to zero, after the step."""
    for layer in layers:
        if layer.has_mean:
            _sums(layer)[0].zero_()


def _sums(layer: Layer) -> Tensor:
    sums = layer.capture.column_sums
    assert sums is not None
    return sums
