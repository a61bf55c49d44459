"""Share statistics between processes: all-reduce the sums, broadcast each P from its owner.

Messages hold only the upper triangle of each symmetric matrix. A single process copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..process_group import Collective, owners
from .layer import Layer
from .statistics import InverseRoot, mean_eigenvalue

# Bytes of packed sums per message. While one message is awaited, the next ones are under way.
MESSAGE_BYTES = 128 * 2**20


def pack(S: Tensor) -> Tensor:
    """Return the upper triangles of (blocks, b, b) as one vector. Returns (d,) unchanged."""
    if S.dim() == 1:
        return S
    i, j = torch.triu_indices(*S.shape[-2:], device=S.device)
    return S[:, i, j].flatten()  # (blocks b (b + 1) / 2,)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """Return a copy of the symmetric blocks of this shape that `pack` packed."""
    if len(shape) == 1:
        return packed.clone()
    i, j = torch.triu_indices(*shape[-2:], device=packed.device)
    S = packed.new_empty(shape)
    S[:, i, j] = S[:, j, i] = packed.view(shape[0], -1)
    return S


def packed_numel(shape: torch.Size) -> int:
    """Return the number of elements that `pack` returns for this shape."""
    return shape[0] if len(shape) == 1 else shape[0] * shape[-1] * (shape[-1] + 1) // 2


class Sums:
    """Add up, over all processes, the sums of z zᵀ and the token counts since the last refresh.

    The captures do not change. Tokens may be distributed over processes in any way; a process
    without tokens adds zeros.

    Attributes:
        counts_and_mean_eigenvalues: for each layer (2,) float64, the number of tokens and the mean
            eigenvalue tr(S) / d_in of the sum S of z zᵀ.
    """

    def __init__(self, layers: list[Layer], collective: Collective) -> None:
        self._collective = collective
        self._packed: dict[Layer, Tensor] = {}
        self._works: dict[Layer, Any] = {}
        rows = [
            torch.stack([each.capture.count.double(), mean_eigenvalue(each.capture.gram).double()])
            for each in layers
        ]
        summed = collective.sum_(torch.stack(rows)) if collective.size > 1 and layers else rows
        self.counts_and_mean_eigenvalues = dict(zip(layers, summed, strict=True))

    def start(self, layers: Iterable[Layer]) -> None:
        """Start to sum the matrices of these layers asynchronously, message by message."""
        if self._collective.size == 1:
            return
        for message in messages(layers):
            buffer = torch.cat([pack(layer.capture.gram) for layer in message])
            work = self._collective.start_sum_(buffer)
            sizes = [packed_numel(layer.capture.gram.shape) for layer in message]
            self._packed |= zip(message, buffer.split(sizes), strict=True)
            self._works |= dict.fromkeys(message, work)

    def gram(self, layer: Layer) -> Tensor:
        """Wait for and return the sum of z zᵀ of a layer that was passed to `start`."""
        if self._collective.size == 1:
            return layer.capture.gram
        self._collective.wait([self._works[layer]])
        self._works[layer] = None
        return unpack(self._packed[layer], layer.capture.gram.shape)

    def count(self, layer: Layer) -> Tensor:
        """Return the number of tokens in `gram`, () int64."""
        if self._collective.size == 1:
            return layer.capture.count
        return self.counts_and_mean_eigenvalues[layer][0].long()


def gathered_state(layers: list[Layer], collective: Collective) -> dict[str, Any]:
    """Return {layer: {key: value}} in every process, with the running sums of all processes."""
    state = {layer.name: layer.state_dict() for layer in layers}
    if collective.size > 1:
        sums = Sums(layers, collective)
        sums.start(layers)
        for layer in layers:
            state[layer.name] |= {"gram": sums.gram(layer), "count": sums.count(layer)}
            if layer.has_mean:
                collective.sum_(state[layer.name]["column_sums"])  # a copy
    return state


def messages(layers: Iterable[Layer]) -> list[list[Layer]]:
    """Group layers of one dtype into messages of at most MESSAGE_BYTES, or of a single layer."""
    result: list[list[Layer]] = []
    room, dtype = 0, None
    for layer in layers:
        n_bytes = packed_numel(layer.sigma.shape) * layer.sigma.element_size()
        if n_bytes > room or layer.sigma.dtype != dtype:
            result.append([])
            room, dtype = MESSAGE_BYTES, layer.sigma.dtype
        result[-1].append(layer)
        room -= n_bytes
    return result


def made_by_owners(
    layers: list[Layer],
    make: Callable[[list[Layer]], list[tuple[Layer, InverseRoot]]],
    collective: Collective,
) -> list[tuple[Layer, InverseRoot]]:
    """Compute the P of each layer with `make` in one process, its owner, and broadcast it.

    Owners are chosen so that all processes have about equal work, see `_cost`. If `make` raises
    FloatingPointError in one process, all processes raise it.
    """
    if collective.size == 1 or not layers:
        return make(layers)
    owner = owners_of(layers, collective.size)
    own = [layer for layer in layers if owner[layer] == collective.rank]
    made, error = {}, None
    try:
        made = dict(make(own))
    except FloatingPointError as caught:
        error = caught
    flags = _exchange_flags(layers, own, made, collective)
    if error is not None:
        raise error
    if missing := [layer.label for layer, (*_, is_missing) in flags.items() if is_missing]:
        raise FloatingPointError(
            f"another process cannot invert Σ of at least one of these layers: {', '.join(missing)}"
        )
    tensors = _broadcast(layers, owner, made, collective)
    return [
        (layer, InverseRoot(*tensors[layer], int(n_failed), bool(is_damped_more)))
        for layer, (n_failed, is_damped_more, _) in flags.items()
    ]


def owners_of(layers: list[Layer], size: int) -> dict[Layer, int]:
    """Return which of `size` processes computes the P of each layer."""
    return dict(zip(layers, owners([_cost(each) for each in layers], size), strict=True))


def _cost(layer: Layer) -> float:
    """Estimate the work of computing P, up to a constant factor."""
    shape = layer.sigma.shape
    return float(shape[0] if len(shape) == 1 else shape[0] * shape[-1] ** 3)


def _exchange_flags(
    layers: list[Layer],
    own: list[Layer],
    made: dict[Layer, InverseRoot],
    collective: Collective,
) -> dict[Layer, list[float]]:
    """Return [n_failed, is_damped_more, is_missing] of every layer's P, in all processes."""
    rows = {
        layer: [made[layer].n_failed, made[layer].is_damped_more, 0] if layer in made else [0, 0, 1]
        for layer in own
    }
    table = [rows.get(layer, [0, 0, 0]) for layer in layers]  # zeros for the layers of others
    device = layers[0].sigma.device
    table = collective.sum_(torch.tensor(table, dtype=torch.float64, device=device))
    return dict(zip(layers, table.tolist(), strict=True))


def _broadcast(
    layers: list[Layer],
    owner: dict[Layer, int],
    made: dict[Layer, InverseRoot],
    collective: Collective,
) -> dict[Layer, tuple[Tensor, Tensor, Tensor | None]]:
    """Return P, damping and deflation basis U of every layer, broadcast by its owner.

    Each message has one dtype.
    """
    works, parts = [], []
    for rank in range(collective.size):
        for message in messages(layer for layer in layers if owner[layer] == rank):
            sizes = [size for each in message for size in sent_sizes(each)]
            if rank == collective.rank:
                buffer = torch.cat([part for each in message for part in _parts(made[each])])
            else:
                buffer = message[0].P.new_empty(sum(sizes))
            works.append(collective.start_broadcast_(buffer, rank))
            values = buffer.split(sizes)
            triples = zip(values[::3], values[1::3], values[2::3], strict=True)
            parts += zip(message, triples, strict=True)
    collective.wait(works)
    return {
        layer: (unpack(P, layer.P.shape), damping.clone(), _basis_from(U, layer))
        for layer, (P, damping, U) in parts
    }


def sent_sizes(layer: Layer) -> tuple[int, int, int]:
    """Return the numbers of elements of P, damping and U in a message."""
    U = layer.deflation_basis
    return packed_numel(layer.P.shape), len(layer.damping), 0 if U is None else U.numel()


def _parts(made: InverseRoot) -> tuple[Tensor, Tensor, Tensor]:
    """Return P, damping and U as vectors. U is empty if there is no deflation."""
    U = made.deflation_basis
    return pack(made.P), made.damping, made.damping.new_empty(0) if U is None else U.flatten()


def _basis_from(values: Tensor, layer: Layer) -> Tensor | None:
    """Return the received vector in the shape of the layer's U, or None if it has no U."""
    U = layer.deflation_basis
    return None if U is None else values.view(U.shape).clone()
