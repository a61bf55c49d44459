"""Share statistics between processes: all-reduce the sums, broadcast each P from its owner.

What only its owner holds (ownership.py) is not sent. A single process copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..process_group import Collective
from .layer import Layer
from .ownership import Processes, held, layer_owners
from .statistics import InverseRoot, mean_eigenvalue
from .triangles import pack, packed_numel, unpack

# Bytes of packed sums per message. While one message is awaited, the next ones are under way.
MESSAGE_BYTES = 128 * 2**20


class Sums:
    """Add up, over all processes, the sums of z zᵀ and the token counts since the last refresh.

    The captures do not change. Tokens may be distributed over processes in any way; a process
    without tokens adds zeros.

    Args:
        was_formed: whether a backward of this process formed gradients since the last step.
    """

    def __init__(
        self, layers: list[Layer], processes: Processes, *, was_formed: bool = False
    ) -> None:
        everybody = processes.everybody
        self._processes, self._was_formed = processes, was_formed
        self._packed: dict[Layer, Tensor] = {}
        self._works: dict[Layer, Any] = {}
        rows = [torch.stack([each.capture.count.double(), _trace_mean(each)]) for each in layers]
        self._digest = next((x.capture.reduction.digest for x in layers if x.capture.reduction), 0)
        self.is_shared = everybody.size > 1 and bool(layers)  # whether processes added them up
        if self.is_shared:
            flags = rows[0].new_tensor([self._digest, was_formed])
            rows = [*everybody.sum_(torch.stack([*rows, flags]))]
        self._rows = rows  # (2,) float64 each: one per layer, and the sum of the flags if shared
        self._counts = {layer: row[0] for layer, row in zip(layers, rows, strict=False)}

    @cached_property
    def counts_and_mean_eigenvalues(self) -> list[list[float]]:
        """The number of tokens and the mean eigenvalue tr(S) / d_in of the S of each layer.

        The sum of the flags of all processes may follow. Waits for the device once.
        """
        rows = [row.to(self._rows[0].device) for row in self._rows]
        return torch.stack(rows).tolist() if rows else []

    @property
    def was_formed(self) -> bool:
        """Whether a backward of any of the processes that added up formed gradients."""
        if self._was_formed or not self.is_shared:
            return self._was_formed
        return self.counts_and_mean_eigenvalues[-1][1] > 0

    def check_order(self) -> None:
        """Raise RuntimeError if the processes sent the sums of other layers, or in another order.

        Waits for the device.
        """
        size = self._processes.everybody.size
        if self.is_shared and self.counts_and_mean_eigenvalues[-1][0] != size * self._digest:
            raise RuntimeError(
                "the processes ran backward passes through other layers, or in another order, so "
                "that the sums of different layers were added: use statistics='replicated', which "
                "allows it"
            )

    def start(self, layers: Iterable[Layer]) -> None:
        """Start to sum the matrices of these layers asynchronously, message by message.

        Those of an owner are summed over the processes that own the same layers.
        """
        layers = list(layers)
        replicated = [layer for layer in layers if layer.owner is None]
        own = [layer for layer in held(layers) if layer.owner is not None]
        self._start(replicated, self._processes.everybody)
        self._start(own, self._processes.replicas)

    def _start(self, layers: list[Layer], collective: Collective) -> None:
        if collective.size == 1:
            return
        for message in messages(layers):
            buffer = torch.cat([pack(layer.gram) for layer in message])
            work = collective.start_sum_(buffer)
            sizes = [packed_numel(layer.shape) for layer in message]
            self._packed |= zip(message, buffer.split(sizes), strict=True)
            self._works |= dict.fromkeys(message, work)

    def is_summed(self, layer: Layer) -> bool:
        """Return whether the sum of a layer comes from several processes."""
        return layer in self._works

    def gram(self, layer: Layer) -> Tensor:
        """Wait for and return the sum of z zᵀ of a layer that was passed to `start`.

        The processes that do not hold it get a sum without blocks.
        """
        if not self.is_summed(layer):
            return layer.gram
        Collective.wait([self._works[layer]])
        self._works[layer] = None
        return unpack(self._packed[layer], layer.shape)

    def count(self, layer: Layer) -> Tensor:
        """Return the number of tokens in `gram`, () int64."""
        if self._processes.everybody.size == 1:
            return layer.capture.count
        return self._counts[layer].long()


def _trace_mean(layer: Layer) -> Tensor:  # () float64
    """Return tr(S) / d_in of the sum that this process has; 0 if it has none."""
    S = layer.capture.gram
    return mean_eigenvalue(S).double() if len(S) else S.new_zeros((), dtype=torch.float64)


def messages(layers: Iterable[Layer]) -> list[list[Layer]]:
    """Group layers of one dtype into messages of at most MESSAGE_BYTES, or of a single layer."""
    result: list[list[Layer]] = []
    room, dtype = 0, None
    for layer in layers:
        n_bytes = packed_numel(layer.shape) * layer.sigma.element_size()
        if n_bytes > room or layer.sigma.dtype != dtype:
            result.append([])
            room, dtype = MESSAGE_BYTES, layer.sigma.dtype
        result[-1].append(layer)
        room -= n_bytes
    return result


def made_by_owners(
    layers: list[Layer],
    make: Callable[[list[Layer]], list[tuple[Layer, InverseRoot]]],
    processes: Processes,
) -> list[tuple[Layer, InverseRoot]]:
    """Compute the P of each layer with `make` in one process, its owner.

    The owner broadcasts it, unless only the owner holds the statistics; the other processes then
    get a P without blocks. Owners are chosen so that all processes have about equal work, see
    `layer_owners`. If `make` raises FloatingPointError in one process, all processes raise it.
    """
    replicated = [layer for layer in layers if layer.owner is None]
    owned = {layer: layer.owner for layer in layers if layer.owner is not None}
    owner = layer_owners(replicated, processes.everybody.size)
    made = _made_by_owners(owner, make, processes.everybody, is_sent=True)
    return made + _made_by_owners(owned, make, processes.shards, is_sent=False)


def _made_by_owners(
    owner: dict[Layer, int],
    make: Callable[[list[Layer]], list[tuple[Layer, InverseRoot]]],
    collective: Collective,
    *,
    is_sent: bool,
) -> list[tuple[Layer, InverseRoot]]:
    layers = list(owner)
    if collective.size == 1 or not layers:
        return make(layers)
    own = [layer for layer in layers if owner[layer] == collective.rank]
    made, error = {}, None
    try:
        made = dict(make(own))
    except FloatingPointError as caught:
        error = caught
    means, flags = _exchange_flags(layers, own, made, collective)
    if error is not None:
        raise error
    if missing := [layer.label for layer, (*_, is_missing) in flags.items() if is_missing]:
        raise FloatingPointError(
            f"another process cannot invert Σ of at least one of these layers: {', '.join(missing)}"
        )
    if is_sent:
        tensors = _broadcast(layers, owner, made, collective)
    else:
        tensors = {layer: made[layer][:3] if layer in made else _nothing(layer) for layer in layers}
    return [
        (layer, InverseRoot(*tensors[layer], means[layer], int(n), bool(is_more)))
        for layer, (n, is_more, _) in flags.items()
    ]


def _nothing(layer: Layer) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return P, damping and U of a layer that this process does not hold, without blocks."""
    return layer.P, layer.damping, layer.deflation_basis


def _exchange_flags(
    layers: list[Layer],
    own: list[Layer],
    made: dict[Layer, InverseRoot],
    collective: Collective,
) -> tuple[dict[Layer, Tensor], dict[Layer, list[float]]]:
    """Return what all processes must know of every P that its owner made.

    These are its mean eigenvalue, and [n_failed, is_damped_more, is_missing]. Waits for the device
    once.
    """
    rows = [
        [0, made[x].n_failed, made[x].is_damped_more, 0] if x in made else [0, 0, 0, x in own]
        for x in layers
    ]
    table = torch.tensor(rows, dtype=torch.float64, device=layers[0].sigma.device)
    if made:
        index = [i for i, layer in enumerate(layers) if layer in made]
        table[index, 0] = torch.stack([made[layers[i]].mean_eigenvalue for i in index]).double()
    collective.sum_(table)
    flags = dict(zip(layers, table[:, 1:].tolist(), strict=True))
    means = dict(zip(layers, table[:, 0], strict=True))
    return {layer: mean.to(layer.P.dtype, copy=True) for layer, mean in means.items()}, flags


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
    return packed_numel(layer.shape), layer.blocks, 0 if U is None else U.numel()


def _parts(made: InverseRoot) -> tuple[Tensor, Tensor, Tensor]:
    """Return P, damping and U as vectors. U is empty if there is no deflation."""
    U = made.deflation_basis
    return pack(made.P), made.damping, made.damping.new_empty(0) if U is None else U.flatten()


def _basis_from(values: Tensor, layer: Layer) -> Tensor | None:
    """Return the received vector in the shape of the layer's U, or None if it has no U."""
    U = layer.deflation_basis
    return None if U is None else values.view(U.shape).clone()
