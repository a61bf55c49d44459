"""M = G P for many layers: those of equal shape in one launch on a GPU, each alone elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.choice import Kernel, choose
from optim.covariance import precondition
from optim.refresh import chunks
from optim.statistics import Layer


def preconditioned(
    layers: list[Layer], kernel: Kernel
) -> Iterator[tuple[Layer, Tensor, Tensor, Tensor]]:
    """Each layer that has a gradient and a P, its gradient, and G and M = G P, (d_out, d_in).

    At most `optim.refresh.CHUNK_BYTES` of M, or one M, are made at a time (by Triton, with copies
    of their G and P): write each into its gradient before asking for the next.
    """
    grads: dict[Layer, Tensor] = {}
    for layer in layers:
        grad = layer.covered.weight.grad
        if grad is not None and layer.n_refreshes:
            grads[layer] = grad
    for chunk in chunks(list(grads), lambda layer: (grads[layer], layer.P)):
        Gs = [layer.covered.as_matrix(grads[layer]) for layer in chunk]
        Ms = products(Gs, [layer.P for layer in chunk], kernel)
        for layer, G, M in zip(chunk, Gs, Ms, strict=True):
            yield layer, grads[layer], G, M


def products(Gs: list[Tensor], Ps: list[Tensor], kernel: Kernel) -> Iterator[Tensor]:
    """G P of pairs of equal shapes, one after the other; a diagonal P is not worth a kernel."""
    P = Ps[0]
    row_bytes = P.shape[-1] * P.element_size()
    if P.dim() == 1 or choose(kernel, "G P", P, row_bytes=[row_bytes]) == "torch":
        return map(precondition, Gs, Ps)
    from kernels._triton_apply import apply

    return iter(apply(torch.stack([G.to(P.dtype) for G in Gs]), torch.stack(Ps)))
