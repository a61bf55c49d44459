"""From running sums to new Σ and P, for many layers at once: few host reads, bounded memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..kernels.cholesky import damped_inverse_root
from ..kernels.dispatch import Backend, choose_backend
from ..process_group import Collective, first_row, is_sharded
from .distributed import Sums, made_by_owners
from .layer import (
    DoprSettings,
    InverseRoot,
    Layer,
    condition_bound,
    diagonal_inverse_root,
    mean_eigenvalue,
    norm_ratio,
    precondition,
)

# Of Σ inverted together, for which about 5 times as much is needed, or of gradients in one launch.
CHUNK_BYTES = 256 * 2**20


def refresh(layers: list[Layer], settings: DoprSettings, collective: Collective) -> list[Layer]:
    """New Σ and P for the layers that have new statistics; returns these layers.

    The statistics are those of all processes, whose calls of this belong together.

    All P are made before the first layer is changed: an error leaves every Σ, P and schedule as it
    was, at the price of a second P of every layer for the time being. Sums that are not finite or
    all zero are dropped all the same. Waits for the device a few times a chunk, not a layer.

    Raises:
        RuntimeError: a layer has a gradient but its activations were not seen.
        FloatingPointError: activations are not finite and there is no earlier P to keep, or Σ has
            no inverse at any damping.
        ValueError: the model was moved or cast meanwhile.
    """
    for layer in layers:
        layer.check_place()
    sums = Sums(layers, collective)
    fresh = _with_statistics(layers, sums, collective)
    sums.start(fresh)

    def next_statistics(layer: Layer) -> tuple[Tensor, Tensor | None]:
        return layer.next_sigma(sums.gram(layer), sums.count(layer)), layer.deflation_basis

    for layer, new in preconditioners(fresh, next_statistics, settings, collective):
        layer.sigma = next_statistics(layer)[0]  # formed again rather than kept for all layers
        layer.use(new)
        layer.n_refreshes += 1
        layer.next_refresh = layer.following_refresh
        layer.capture.clear()
    return fresh


def preconditioners(
    layers: list[Layer],
    statistics_of: Callable[[Layer], tuple[Tensor, Tensor | None]],
    settings: DoprSettings,
    collective: Collective,
) -> list[tuple[Layer, InverseRoot]]:
    """Every layer with its P from the Σ and U that `statistics_of` gives; no layer is changed.

    Raises FloatingPointError if a Σ is not finite or has no inverse at any damping.
    """
    return made_by_owners(layers, lambda own: _made(own, statistics_of, settings), collective)


def _made(
    layers: list[Layer],
    statistics_of: Callable[[Layer], tuple[Tensor, Tensor | None]],
    settings: DoprSettings,
) -> list[tuple[Layer, InverseRoot]]:
    made = []
    for chunk in chunks(layers, lambda layer: (layer.sigma,)):
        sigma, U = _stacked([statistics_of(layer) for layer in chunk])
        try:
            made += zip(chunk, _invert(sigma, U, settings), strict=True)
        except FloatingPointError:
            _name_culprit(chunk, sigma, settings)
            raise
    return made


def _stacked(statistics: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Σ of N layers, (N, blocks, b, b) or (N, d), and U, (N, blocks, b, k) or None."""
    deflation_basis = [U for _, U in statistics if U is not None]
    return torch.stack([sigma for sigma, _ in statistics]), (
        torch.stack(deflation_basis) if deflation_basis else None
    )


def _name_culprit(layers: list[Layer], sigma: Tensor, settings: DoprSettings) -> None:
    """Invert one by one what failed as a batch, to raise with the name of the layer."""
    for layer, one in zip(layers, sigma, strict=True):
        try:
            _invert(one[None], None, settings)
        except FloatingPointError as error:
            raise FloatingPointError(f"{layer.label}: {error}") from error


def chunks(
    layers: list[Layer], tensors_of: Callable[[Layer], tuple[Tensor, ...]]
) -> Iterator[list[Layer]]:
    """Layers whose tensors are alike, `CHUNK_BYTES` of the first or a single layer at a time."""
    alike: dict[Any, list[Layer]] = defaultdict(list)
    for layer in layers:
        kind = tuple((each.shape, each.dtype, each.device) for each in tensors_of(layer))
        alike[kind].append(layer)
    for group in alike.values():
        size = max(1, CHUNK_BYTES // tensors_of(group[0])[0].nbytes)
        for first in range(0, len(group), size):
            yield group[first : first + size]


def _invert(sigma: Tensor, U: Tensor | None, settings: DoprSettings) -> list[InverseRoot]:
    """P of each of N covariances, (N, blocks, b, b) or (N, d), as one batch."""
    p, gamma = settings.exponent, settings.gamma
    means = torch.stack([mean_eigenvalue(each) for each in sigma])  # (N,)
    blocks = 1 if sigma.dim() == 2 else sigma.shape[1]
    damping = wanted = (gamma * means)[:, None].expand(-1, blocks)  # (N, blocks)
    if sigma.dim() == 2:
        P, n_failed = diagonal_inverse_root(sigma, damping, p), [0] * len(sigma)
    else:
        P, damping, failures = damped_inverse_root(
            sigma,
            damping,
            p,
            inverse=settings.inverse,
            backend=settings.backend,
            condition_bound=condition_bound(blocks * sigma.shape[-1], gamma),
            deflation_basis=U,  # a copy of the layers', updated in place
        )
        n_failed = failures.sum(1).tolist()
    more = (damping > wanted).any(1).tolist() if any(n_failed) else [False] * len(sigma)
    scales = means ** (1 / p) if settings.trace_normalized else torch.ones_like(means)
    return [
        InverseRoot(
            P=P[i] * scales[i],
            damping=damping[i].clone(),
            deflation_basis=None if U is None else U[i].clone(),
            n_failed=n_failed[i],
            is_damped_more=more[i],
        )
        for i in range(len(sigma))
    ]


def _with_statistics(layers: list[Layer], sums: Sums, collective: Collective) -> list[Layer]:
    """The layers whose running sum is of use; what keeps the others from it is dealt with.

    One host read for all layers. The mean eigenvalue says enough: because of |z_i z_j| <=
    (z_i² + z_j²) / 2, Σ z zᵀ is zero if it is zero, and finite if it is finite.
    """
    unseen, broken, zero, usable = [], [], [], []
    for layer, (count, mean) in zip(
        layers, _read(list(sums.token_counts_and_traces.values())), strict=True
    ):
        kind = unseen if count == 0 else zero if mean == 0 else usable
        (kind if math.isfinite(mean) else broken).append(layer)
    _refuse_unseen(unseen, collective)
    _drop_broken(broken)
    _drop_zero(zero, collective)
    return usable


def _refuse_unseen(layers: list[Layer], collective: Collective) -> None:
    """Layers without tokens were not used in this step, or something is wrong with the capture."""
    held = _with_gradient(layers, collective)
    missed = [layer.name for layer in held]
    if missed:
        others = f" (nor those of {len(missed) - 1} more layers)" if missed[1:] else ""
        raise RuntimeError(
            f"{held[0].label} has a gradient but its input activations were not seen{others}. "
            "Likely causes: its forward is bypassed (F.linear on its weight, a fused or functional "
            "call), or was traced, exported or replaced; every backward ran inside paused(), or "
            "before the preconditioner was made or discard() was called; the gradient was set by "
            f"hand. A layer that is never seen is left out by exclude={missed}"
        )


def _drop_broken(layers: list[Layer]) -> None:
    """Sums that are not finite go; the last P is kept, where there is one."""
    for layer in layers:
        layer.capture.clear()
    first = [layer.label for layer in layers if layer.n_refreshes == 0]
    if first:
        raise FloatingPointError(f"the first activations seen by {', '.join(first)} are not finite")
    for layer in layers:
        layer.fallbacks("activations are not finite; the last P is kept")


def _drop_zero(layers: list[Layer], collective: Collective) -> None:
    """Zero tokens show no direction; a gradient from others than these is a case to mend."""
    for layer in layers:
        layer.capture.clear()
    for layer in _with_gradient(layers, collective):
        what = "the last P is kept" if layer.n_refreshes else "the gradient is left as it is"
        layer.fallbacks(f"all sampled activations are zero; {what}")


def _with_gradient(layers: list[Layer], collective: Collective) -> list[Layer]:
    """The layers whose gradient is not zero in all processes; one host read.

    A gradient may be absent in some processes only: all of them ask for all layers.
    """
    if not layers:
        return []
    device = layers[0].sigma.device
    grads = [layer.covered.grad for layer in layers]
    flags = [torch.zeros((), dtype=torch.bool) if g is None else g.any() for g in grads]
    n_with = collective.sum_(torch.stack([flag.to(device) for flag in flags]).long())
    return [layer for layer, n in zip(layers, n_with.tolist(), strict=True) if n]


def _read(values: list[Tensor]) -> list[Any]:
    """Tensors of one shape, wherever they are, as numbers: the host waits once for all."""
    return torch.stack([each.to(values[0].device) for each in values]).tolist() if values else []


def preconditioned(
    layers: list[Layer], backend: Backend
) -> Iterator[tuple[Layer, Tensor, Tensor, Tensor]]:
    """Each layer that has a gradient and a P, its gradient, and G and M = G P, (d_out, d_in).

    Of a sharded weight, these are the rows that are here: row i of M is row i of G times P.
    At most `optim.dopr.refresh.CHUNK_BYTES` of M, or one M, are made at a time (by Triton, with copies
    of their G and P): write each into its gradient before asking for the next.
    """
    grads: dict[Layer, Tensor] = {}
    for layer in layers:
        grad = layer.covered.grad
        if grad is None or not layer.n_refreshes:
            continue
        if grad.numel():
            grads[layer] = grad
        else:  # no rows are here
            G = layer.covered.as_matrix(grad)
            yield layer, grad, G, G
    for chunk in chunks(list(grads), lambda layer: (grads[layer], layer.P)):
        Gs = [layer.covered.as_matrix(grads[layer]) for layer in chunk]
        Ps = [_local_P(layer, G) for layer, G in zip(chunk, Gs, strict=True)]
        Ms = products(Gs, Ps, backend)
        for layer, G, M in zip(chunk, Gs, Ms, strict=True):
            yield layer, grads[layer], G, M


def _local_P(layer: Layer, G: Tensor) -> Tensor:
    """P, or of an embedding the part that belongs to the rows of the table that are here."""
    if not layer.covered.is_diagonal:
        return layer.P
    first = first_row(layer.covered.weight)
    return layer.P[first : first + G.shape[1]]


def products(Gs: list[Tensor], Ps: list[Tensor], backend: Backend) -> Iterator[Tensor]:
    """G P of pairs of equal shapes, one after the other; a diagonal P is not worth a kernel."""
    P = Ps[0]
    row_bytes = P.shape[-1] * P.element_size()
    if P.dim() == 1 or choose_backend(backend, "G P", P, row_bytes=[row_bytes]) == "torch":
        return map(precondition, Gs, Ps)
    from ..kernels._triton_apply import apply

    return iter(apply(torch.stack([G.to(P.dtype) for G in Gs]), torch.stack(Ps)))


def set_norm_ratios(seen: dict[Layer, Tensor], layers: list[Layer], collective: Collective) -> None:
    """‖M‖ / ‖G‖ of these layers, from the norms (2,) of what is here of each."""
    condition_bound = [each for each in layers if is_sharded(each.covered.weight)]
    if condition_bound:
        squares = [seen.get(layer, layer.sigma.new_zeros(2)).square() for layer in condition_bound]
        seen = seen | dict(
            zip(condition_bound, collective.sum_(torch.stack(squares)).sqrt(), strict=True)
        )
    for layer in layers:
        if layer in seen:
            layer.norm_ratio = norm_ratio(seen[layer])
