"""Compute M = G P: running sums -> Σ (EMA) -> damping γ̄ -> P -> M.

    γ̄ = γ tr(Σ)/d_in
    P = (tr(Σ)/d_in)^(1/p) (Σ + γ̄ I)^(-1/p)    the first factor only if `trace_normalized`

With `fresh_mean`, P is computed from C in place of Σ, and M is corrected by the mean (mean.py).

Layers go in chunks of at most CHUNK_BYTES: bounded memory, few synchronizations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..kernels.damped_root import damped_inverse_root
from ..kernels.dispatch import Backend, choose_backend
from ..process_group import Collective, first_row, is_sharded
from .distributed import Sums, made_by_owners
from .exchange import Exchange
from .layer import Layer
from .mean import correct_for_mean
from .ownership import Processes
from .settings import DoprSettings
from .statistics import (
    InverseRoot,
    Statistics,
    apply_P,
    condition_bound,
    diagonal_inverse_root,
    norm_ratio,
)
from .usable import with_usable_sums

# Bytes of Σ inverted in one batch (which takes about 5 times as much), or of gradients multiplied.
# A single layer may exceed it.
CHUNK_BYTES = 256 * 2**20


def refresh(
    layers: list[Layer],
    sums: Sums,
    gram_means: dict[Layer, Tensor],
    settings: DoprSettings,
    processes: Processes,
) -> list[Layer]:
    """Compute Σ and P from the running sums of all processes.

    All processes must call this together. All P are computed before the first layer changes, so an
    error leaves every Σ, P and schedule as it was, at the cost of holding every P twice for a
    while. Sums that are not finite or all zero are dropped even so, and the means of the step,
    which `update_means` has set, stay. Waits for the device a few times per chunk of layers, not
    per layer. Processes that do not hold the statistics of a layer only take note of the refresh.

    Args:
        sums: of these layers.
        gram_means: what `update_means` returned.
    Returns:
        The layers that have a new P.
    Raises:
        RuntimeError: if a layer has a gradient but its activations were not captured.
        FloatingPointError: if activations are not finite and there is no earlier P to keep, or Σ
            has no inverse at any damping.
    """
    usable = with_usable_sums(layers, sums, processes.everybody)
    sums.start(usable)

    def next_statistics(layer: Layer) -> Statistics:
        gram_mean = gram_means.get(layer, layer.mean)
        return layer.next_statistics(sums.gram(layer), sums.count(layer), gram_mean)

    for layer, new in inverse_roots(usable, next_statistics, settings, processes):
        if layer.is_held:
            layer.sigma = next_statistics(layer).sigma  # again, to save the memory of all Σ
        layer.set_inverse_root(new)
        layer.n_refreshes += 1
        layer.next_refresh = layer.following_refresh
        layer.capture.clear()
    return usable


def inverse_roots(
    layers: list[Layer],
    statistics_of: Callable[[Layer], Statistics],
    settings: DoprSettings,
    processes: Processes,
) -> list[tuple[Layer, InverseRoot]]:
    """Return each layer with its P.

    Does not change the layers. Raises FloatingPointError, naming the layer, if a Σ is not finite or
    has no inverse at any damping.
    """

    def compute(own: list[Layer]) -> list[tuple[Layer, InverseRoot]]:
        computed: list[tuple[Layer, InverseRoot]] = []
        for chunk in chunks(own, lambda layer: (layer.sigma,)):
            try:
                new = _batched_inverse_roots([statistics_of(layer) for layer in chunk], settings)
            except FloatingPointError:
                _raise_with_layer_name(chunk, statistics_of, settings)
                raise
            computed += zip(chunk, new, strict=True)
        return computed

    return made_by_owners(layers, compute, processes)


def _batched_inverse_roots(
    statistics: list[Statistics], settings: DoprSettings
) -> list[InverseRoot]:
    """Compute P of N layers of one shape as one batch."""
    p, gamma = settings.exponent, settings.gamma
    sigma = torch.stack([each.sigma for each in statistics])  # (N, blocks, b, b) or (N, d)
    means = torch.stack([each.mean_eigenvalue for each in statistics])  # (N,)
    bases = [each.deflation_basis for each in statistics if each.deflation_basis is not None]
    U = torch.stack(bases) if bases else None  # (N, blocks, b, k)
    del statistics, bases  # each Σ is in memory once
    covariance_blocks = 1 if sigma.dim() == 2 else sigma.shape[1]
    gamma_bar = (gamma * means)[:, None].expand(-1, covariance_blocks)  # (N, blocks)
    if sigma.dim() == 2:
        P, damping = diagonal_inverse_root(sigma, gamma_bar, p), gamma_bar
        n_failed = [0] * len(sigma)
    else:
        P, damping, failures = damped_inverse_root(
            sigma,
            gamma_bar,
            p,
            inverse=settings.inverse,
            backend=settings.backend,
            condition_bound=condition_bound(covariance_blocks * sigma.shape[-1], gamma),
            deflation_basis=U,  # a copy of the bases of the layers, updated in place
        )
        n_failed = failures.sum(1).tolist()
    more = (damping > gamma_bar).any(1).tolist() if any(n_failed) else [False] * len(sigma)
    scales = means ** (1 / p) if settings.trace_normalized else torch.ones_like(means)
    return [
        InverseRoot(
            P=P[i] * scales[i],
            damping=damping[i].clone(),
            deflation_basis=None if U is None else U[i].clone(),
            mean_eigenvalue=means[i].clone(),
            n_failed=n_failed[i],
            is_damped_more=more[i],
        )
        for i in range(len(sigma))
    ]


def _raise_with_layer_name(
    layers: list[Layer], statistics_of: Callable[[Layer], Statistics], settings: DoprSettings
) -> None:
    """Invert each Σ of a failed batch alone, to raise with the name of the layer that fails."""
    for layer in layers:
        try:
            statistics = statistics_of(layer)._replace(deflation_basis=None)
            _batched_inverse_roots([statistics], settings)
        except FloatingPointError as error:
            raise FloatingPointError(f"{layer.label}: {error}") from error


def preconditioned(
    layers: list[Layer], backend: Backend, exchange: Exchange
) -> Iterator[tuple[Layer, Tensor, Tensor, Tensor]]:
    """Yield layer, grad, its (d_out, d_in) view G, and M = G P, for layers with a grad and a P.

    If this process lacks something that M needs, one that gets all of it computes M (exchange.py).
    """
    yield from _preconditioned_here([x for x in layers if not exchange.carries(x)], backend)

    def product(layer: Layer, G: Tensor) -> Tensor:
        return _corrected(layer, next(products([G], [layer.P], backend)))

    carried = [layer for layer in layers if exchange.carries(layer) and layer.n_refreshes]
    yield from exchange.products(carried, product)


def _preconditioned_here(
    layers: list[Layer], backend: Backend
) -> Iterator[tuple[Layer, Tensor, Tensor, Tensor]]:
    """Do what `preconditioned` does for layers of which this process has P and whole rows of G.

    G is a copy where the strides forbid a view. If the weight is sharded, grad, G and M are its
    local rows. A chunk holds at most `CHUNK_BYTES` of gradients; their M, in at least fp32, may be
    larger. Triton makes the M of a whole chunk at once, from copies of its G and P. Torch makes
    each M on demand, so a caller that keeps no M holds few of them at a time.
    """
    grads: dict[Layer, Tensor] = {}
    for layer in layers:
        grad = layer.covered.grad
        if grad is None or not layer.n_refreshes:
            continue
        if grad.numel():
            grads[layer] = grad
        else:  # this process has no rows of the weight
            G = layer.covered.as_matrix(grad)
            yield layer, grad, G, G
    for chunk in chunks(list(grads), lambda layer: (grads[layer], layer.P)):
        Gs = [layer.covered.as_matrix(grads[layer]) for layer in chunk]
        Ps = [_local_P(layer, G) for layer, G in zip(chunk, Gs, strict=True)]
        Ms = products(Gs, Ps, backend)
        for layer, G, M in zip(chunk, Gs, Ms, strict=True):
            yield layer, grads[layer], G, _corrected(layer, M)


def _corrected(layer: Layer, M: Tensor) -> Tensor:
    """Return M, corrected for the mean of this step if the layer has one."""
    if not layer.has_mean:
        return M
    scale = layer.mean_eigenvalue if layer.settings.trace_normalized else 1.0
    return correct_for_mean(M, layer.P, layer.mean, scale)


def _local_P(layer: Layer, G: Tensor) -> Tensor:
    """Return P, or the part of an embedding's P that belongs to the local rows of the table."""
    if not layer.covered.is_diagonal:
        return layer.P
    first = first_row(layer.covered.weight)
    return layer.P[first : first + G.shape[1]]


def products(Gs: list[Tensor], Ps: list[Tensor], backend: Backend) -> Iterator[Tensor]:
    """Yield G P for pairs of equal shapes. A diagonal P never uses the Triton kernel."""
    P = Ps[0]
    row_bytes = P.shape[-1] * P.element_size()
    if P.dim() == 1 or choose_backend(backend, "G P", P, row_bytes=[row_bytes]) == "torch":
        return map(apply_P, Gs, Ps)
    from ..kernels._triton_apply import apply

    return iter(apply(torch.stack([G.to(P.dtype) for G in Gs]), torch.stack(Ps)))


def set_norm_ratios(
    local_norms: dict[Layer, Tensor], layers: list[Layer], collective: Collective
) -> None:
    """Set ‖M‖ / ‖G‖ of these layers from the norms (‖M‖, ‖G‖) of their local rows."""
    norms = dict(local_norms)
    if sharded := [layer for layer in layers if is_sharded(layer.covered.weight)]:
        squares = [norms.get(layer, layer.sigma.new_zeros(2)).square() for layer in sharded]
        totals = collective.sum_(torch.stack(squares)).sqrt()
        norms |= zip(sharded, totals, strict=True)
    for layer in layers:
        if layer in norms:
            layer.norm_ratio = norm_ratio(norms[layer])


def chunks(
    layers: list[Layer], tensors_of: Callable[[Layer], tuple[Tensor, ...]]
) -> Iterator[list[Layer]]:
    """Group layers whose tensors agree in shape, dtype and device.

    A group holds at most `CHUNK_BYTES` of the first tensor, or a single layer.
    """
    groups: dict[Any, list[Layer]] = defaultdict(list)
    for layer in layers:
        key = tuple((each.shape, each.dtype, each.device) for each in tensors_of(layer))
        groups[key].append(layer)
    for group in groups.values():
        size = max(1, CHUNK_BYTES // tensors_of(group[0])[0].nbytes)
        for first in range(0, len(group), size):
            yield group[first : first + size]
