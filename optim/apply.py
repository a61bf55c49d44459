"""M = G P for many layers: those of equal shape in one launch on a GPU, each alone elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.choice import Kernel, choose
from optim.collective import Collective, first_row, is_sharded
from optim.covariance import norm_ratio, precondition
from optim.refresh import chunks
from optim.statistics import Layer


def preconditioned(
    layers: list[Layer], kernel: Kernel
) -> Iterator[tuple[Layer, Tensor, Tensor, Tensor]]:
    """Each layer that has a gradient and a P, its gradient, and G and M = G P, (d_out, d_in).

    Of a sharded weight, these are the rows that are here: row i of M is row i of G times P.
    At most `optim.refresh.CHUNK_BYTES` of M, or one M, are made at a time (by Triton, with copies
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
        Ms = products(Gs, Ps, kernel)
        for layer, G, M in zip(chunk, Gs, Ms, strict=True):
            yield layer, grads[layer], G, M


def _local_P(layer: Layer, G: Tensor) -> Tensor:
    """P, or of an embedding the part that belongs to the rows of the table that are here."""
    if not layer.covered.is_diagonal:
        return layer.P
    first = first_row(layer.covered.weight)
    return layer.P[first : first + G.shape[1]]


def products(Gs: list[Tensor], Ps: list[Tensor], kernel: Kernel) -> Iterator[Tensor]:
    """G P of pairs of equal shapes, one after the other; a diagonal P is not worth a kernel."""
    P = Ps[0]
    row_bytes = P.shape[-1] * P.element_size()
    if P.dim() == 1 or choose(kernel, "G P", P, row_bytes=[row_bytes]) == "torch":
        return map(precondition, Gs, Ps)
    from kernels._triton_apply import apply

    return iter(apply(torch.stack([G.to(P.dtype) for G in Gs]), torch.stack(Ps)))


def set_norm_ratios(seen: dict[Layer, Tensor], layers: list[Layer], collective: Collective) -> None:
    """‖M‖ / ‖G‖ of these layers, from the norms (2,) of what is here of each."""
    spread = [each for each in layers if is_sharded(each.covered.weight)]
    if spread:
        squares = [seen.get(layer, layer.sigma.new_zeros(2)).square() for layer in spread]
        seen = seen | dict(zip(spread, collective.sum_(torch.stack(squares)).sqrt(), strict=True))
    for layer in layers:
        if layer in seen:
            layer.norm_ratio = norm_ratio(seen[layer])
