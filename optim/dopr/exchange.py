"""Compute M = G P where P is: send the rows of G to the owner of P, and get back those of M.

From a few processes on, that is less to send than P, which would have to go to every process.
Layers go in chunks, of which an owner holds at most CHUNK_BYTES at a time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor

from ..matrices import Copies, Rows
from ..process_group import Collective, local, row_mesh_dim
from .layer import Layer

CHUNK_BYTES = 256 * 2**20  # of whole gradients in one process; a single layer may exceed it
Product = Callable[[Layer, Tensor], Tensor]  # maps the owner's layer and its whole G to M


class Exchange:
    """The messages for layers whose statistics only their owners hold."""

    def __init__(self, shards: Collective) -> None:
        self._shards = shards
        self._plans: dict[tuple[Layer, ...], list[_Plan]] = {}

    def products(
        self, layers: list[Layer], product: Product
    ) -> Iterator[tuple[Layer, Tensor, Tensor, Tensor]]:
        """Yield layer, grad, its (d_out, d_in) view G, and M = product(layer, G) for local rows.

        All processes must pass the same layers. A layer without a gradient here yields nothing.
        """
        key = tuple(layers)
        if key not in self._plans:
            self._plans[key] = [_Plan(each, self._shards) for each in exchange_chunks(layers)]
        for plan in self._plans[key]:
            yield from plan.products(product)


class _Plan:
    """One chunk: layers whose gradients have one dtype, and are all sharded or all whole."""

    def __init__(self, layers: list[Layer], shards: Collective) -> None:
        self._layers = layers
        owner = [0 if layer.owner is None else layer.owner for layer in layers]
        self._own = [each for each, rank in zip(layers, owner, strict=True) if rank == shards.rank]
        kind = Copies if row_mesh_dim(layers[0].covered.weight) is None else Rows
        self._messages = kind([_matrix_shape(each) for each in layers], shards, owner)

    def products(self, product: Product) -> Iterator[tuple[Layer, Tensor, Tensor, Tensor]]:
        def work(whole: list[Tensor]) -> list[Tensor]:
            pairs = zip(self._own, whole, strict=True)
            return [_oriented(each, product(each, _oriented(each, G))).to(G) for each, G in pairs]

        rows = [_rows(layer) for layer in self._layers]
        done = self._messages.apply(work, rows)
        for layer, G, M in zip(self._layers, rows, done, strict=True):
            if (grad := layer.covered.grad) is not None:
                yield layer, grad, _oriented(layer, G), _oriented(layer, M)


def exchange_chunks(layers: list[Layer]) -> Iterator[list[Layer]]:
    """Group layers; a group has few of each owner, so that all owners work at the same time."""
    groups: dict[Any, list[Layer]] = defaultdict(list)
    for layer in layers:
        weight = layer.covered.weight
        groups[weight.dtype, row_mesh_dim(weight) is None].append(layer)
    for group in groups.values():
        by_owner: dict[Any, list[Layer]] = defaultdict(list)
        for layer in group:
            by_owner[layer.owner].append(layer)
        in_turns = chain.from_iterable(zip_longest(*by_owner.values()))
        chunk: list[Layer] = []
        n_bytes: Counter[Any] = Counter()  # of each owner in the chunk
        for layer in filter(None, in_turns):
            weight = layer.covered.weight
            size = weight.numel() * weight.element_size()  # of the whole weight
            if n_bytes[layer.owner] and n_bytes[layer.owner] + size > CHUNK_BYTES:
                yield chunk
                chunk, n_bytes = [], Counter()
            chunk.append(layer)
            n_bytes[layer.owner] += size
        yield chunk


def _matrix_shape(layer: Layer) -> tuple[int, ...]:
    """Return the shape of the whole weight as a matrix, whose rows are those of the weight."""
    shape = layer.covered.weight.shape
    return shape[0], shape[1:].numel()


def _rows(layer: Layer) -> Tensor:
    """Return the local rows of the gradient, as a matrix; zeros if there is no gradient."""
    weight = local(layer.covered.weight.detach())
    grad = layer.covered.grad
    return (torch.zeros_like(weight) if grad is None else grad).flatten(1)


def _oriented(layer: Layer, matrix: Tensor) -> Tensor:
    """Change between (d_out, d_in) and the rows and columns of the weight."""
    return matrix.mT if layer.covered.is_transposed else matrix
