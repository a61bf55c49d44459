"""Compute M = G P in one process per layer: send it the parts of G, and get back those of M.

Two kinds of layers need it. If only its owner holds P, rows of G travel, which from a few processes
on is less to send than P. If the columns of G are spread over processes, columns travel: M = G P
needs all of them. Layers go in chunks, of which a process multiplies at most CHUNK_BYTES at a time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..matrices import Copies, Rows
from ..process_group import Collective, local, row_mesh_dim
from .layer import Layer
from .ownership import layer_owners

CHUNK_BYTES = 256 * 2**20  # of whole gradients in one process; a single layer may exceed it
Product = Callable[[Layer, Tensor], Tensor]  # maps a layer and its whole G to M


class Route(NamedTuple):
    """Where the parts of one layer's G are, and where they are multiplied."""

    group: Collective  # the processes that have the parts
    dim: int | None  # the dimension of the weight that is sharded over them; None: all have G
    owner: int  # the rank in the group of the process that multiplies


class Exchange:
    """The messages for layers whose M this process cannot compute alone.

    Args:
        shards: the processes that together hold the statistics that only their owners hold.
    """

    def __init__(self, layers: Iterable[Layer], shards: Collective) -> None:
        self._routes = _routes(layers, shards)
        self._plans: dict[tuple[Layer, ...], list[_Plan]] = {}

    def carries(self, layer: Layer) -> bool:
        """Return whether the G of this layer travels."""
        return layer in self._routes

    def products(
        self, layers: list[Layer], product: Product
    ) -> Iterator[tuple[Layer, Tensor, Tensor, Tensor]]:
        """Yield layer, grad, its (d_out, d_in) view G, and M = product(layer, G): the local parts.

        All processes must pass the same layers. A layer without a gradient here yields nothing.
        """
        key = tuple(layers)
        if key not in self._plans:
            self._plans[key] = [*self._planned(layers)]
        for plan in self._plans[key]:
            yield from plan.products(product)

    def _planned(self, layers: list[Layer]) -> Iterator[_Plan]:
        """Yield a plan for each chunk: of one group and one dtype."""
        together: dict[Any, dict[Layer, Route]] = defaultdict(dict)
        for layer in layers:
            route = self._routes[layer]
            key = route.group.group, route.dim, layer.covered.weight.dtype
            together[key][layer] = route
        for routes in together.values():
            for chunk in exchange_chunks({each: routes[each].owner for each in routes}):
                yield _Plan({layer: routes[layer] for layer in chunk})


def _routes(layers: Iterable[Layer], shards: Collective) -> dict[Layer, Route]:
    """Return the routes of the layers whose G travels."""
    routes: dict[Layer, Route] = {}
    spread: dict[Any, list[Layer]] = defaultdict(list)  # columns, by the group that has them
    for layer in layers:
        weight: Any = layer.covered.weight
        if layer.owner is not None:
            dim = None if row_mesh_dim(weight) is None else 0
            routes[layer] = Route(shards, dim, layer.owner)
        elif (mesh_dim := layer.covered.column_mesh_dim()) is not None:
            spread[weight.device_mesh.get_group(mesh_dim)].append(layer)
    for process_group, members in spread.items():
        group = Collective(process_group)
        for layer, rank in layer_owners(members, group.size).items():
            routes[layer] = Route(group, 0 if layer.covered.is_transposed else 1, rank)
    return routes


class _Plan:
    """One chunk: layers whose gradients have one dtype and are sharded in the same way."""

    def __init__(self, routes: Mapping[Layer, Route]) -> None:
        self._layers = list(routes)
        group, self._dim, _ = routes[self._layers[0]]
        owner = [route.owner for route in routes.values()]
        self._own = [layer for layer in routes if routes[layer].owner == group.rank]
        shapes = [self._sent_shape(layer) for layer in routes]
        self._messages = (Copies if self._dim is None else Rows)(shapes, group, owner)

    def products(self, product: Product) -> Iterator[tuple[Layer, Tensor, Tensor, Tensor]]:
        def work(whole: list[Tensor]) -> list[Tensor]:
            pairs = zip(self._own, whole, strict=True)
            return [self._turned(x, product(x, self._turned(x, G))).to(G) for x, G in pairs]

        parts = [self._sent(layer) for layer in self._layers]
        done = self._messages.apply(work, parts)
        for layer, G, M in zip(self._layers, parts, done, strict=True):
            if (grad := layer.covered.grad) is not None:
                yield layer, grad, self._turned(layer, G), self._turned(layer, M)

    def _sent_shape(self, layer: Layer) -> tuple[int, int]:
        """Return the shape of what the owner gets, a matrix whose rows come from all processes."""
        weight = layer.covered.weight
        if self._dim == 1:
            return weight.shape[1], local(weight.detach()).shape[0]
        return weight.shape[0], weight.shape[1:].numel()

    def _sent(self, layer: Layer) -> Tensor:
        """Return the local part of the gradient as some rows of it; zeros without a gradient."""
        weight = local(layer.covered.weight.detach())
        grad = layer.covered.grad
        matrix = (torch.zeros_like(weight) if grad is None else grad).flatten(1)
        return matrix.mT if self._dim == 1 else matrix

    def _turned(self, layer: Layer, matrix: Tensor) -> Tensor:
        """Change between (d_out, d_in) and what is sent."""
        return matrix.mT if layer.covered.is_transposed != (self._dim == 1) else matrix


def exchange_chunks(owner: Mapping[Layer, int | None]) -> Iterator[list[Layer]]:
    """Group layers; a group has few of each owner, so that all owners work at the same time.

    Args:
        owner: the rank of the process that multiplies, of each layer.
    """
    by_owner: dict[Any, list[Layer]] = defaultdict(list)
    for layer, rank in owner.items():
        by_owner[rank].append(layer)
    in_turns = chain.from_iterable(zip_longest(*by_owner.values()))
    chunk: list[Layer] = []
    n_bytes: Counter[Any] = Counter()  # of each owner in the chunk
    for layer in filter(None, in_turns):
        weight, rank = layer.covered.weight, owner[layer]
        size = weight.numel() * weight.element_size()  # of the whole weight
        if n_bytes[rank] and n_bytes[rank] + size > CHUNK_BYTES:
            yield chunk
            chunk, n_bytes = [], Counter()
        chunk.append(layer)
        n_bytes[rank] += size
    yield chunk
