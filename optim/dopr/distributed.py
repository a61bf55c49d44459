"""The statistics of several processes become one: sums to all, every P from its owner.

Of each symmetric matrix only the upper triangle travels. With one process nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..process_group import Collective, owners
from .layer import InverseRoot, Layer, mean_eigenvalue

# Of packed sums in one message: the next one travels while this one is waited for.
MESSAGE_BYTES = 128 * 2**20


def pack(S: Tensor) -> Tensor:
    """The upper triangles of symmetric blocks (blocks, b, b) as one vector; (d,) as it is."""
    if S.dim() == 1:
        return S
    i, j = torch.triu_indices(*S.shape[-2:], device=S.device)
    return S[:, i, j].flatten()  # (blocks b (b + 1) / 2,)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """The symmetric blocks of this shape from `pack`."""
    if len(shape) == 1:
        return packed.clone()
    i, j = torch.triu_indices(*shape[-2:], device=packed.device)
    S = packed.new_empty(shape)
    S[:, i, j] = S[:, j, i] = packed.view(shape[0], -1)
    return S


def packed_numel(shape: torch.Size) -> int:
    return shape[0] if len(shape) == 1 else shape[0] * shape[-1] * (shape[-1] + 1) // 2


class Sums:
    """Σ z zᵀ and the number of tokens of each layer, over all processes, since the last refresh.

    The captures of this process are left as they are. Tokens may be spread in any way: a process
    without any adds zeros.
    """

    def __init__(self, layers: list[Layer], collective: Collective) -> None:
        self._collective = collective
        self._packed: dict[Layer, Tensor] = {}
        self._works: dict[Layer, Any] = {}
        means = [
            torch.stack([each.capture.count.double(), mean_eigenvalue(each.capture.gram).double()])
            for each in layers
        ]
        self.token_counts_and_traces = dict(
            zip(layers, means, strict=True)
        )  # tokens, mean eigenvalue of Σ z zᵀ
        if collective.size > 1 and layers:
            self.token_counts_and_traces = dict(
                zip(layers, collective.sum_(torch.stack(means)), strict=True)
            )

    def start(self, layers: Iterable[Layer]) -> None:
        """Sum the matrices of these layers, message by message, while something else is done."""
        if self._collective.size == 1:
            return
        for message in messages(layers):
            buffer = torch.cat([pack(layer.capture.gram) for layer in message])
            work = self._collective.start_sum_(buffer)
            sizes = [packed_numel(layer.capture.gram.shape) for layer in message]
            self._packed |= zip(message, buffer.split(sizes), strict=True)
            self._works |= dict.fromkeys(message, work)

    def gram(self, layer: Layer) -> Tensor:
        """Σ z zᵀ of a layer that was started."""
        if self._collective.size == 1:
            return layer.capture.gram
        self._collective.wait([self._works[layer]])
        self._works[layer] = None
        return unpack(self._packed[layer], layer.capture.gram.shape)

    def count(self, layer: Layer) -> Tensor:
        """Tokens in `gram`, () int64."""
        is_one = self._collective.size == 1
        return layer.capture.count if is_one else self.token_counts_and_traces[layer][0].long()


def messages(layers: Iterable[Layer]) -> list[list[Layer]]:
    """Layers of one dtype, at most MESSAGE_BYTES of them, or one, in each."""
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
    """What `make` gives for all layers, each made in one process and sent to the others.

    Owners are chosen so that the work, d_in³, is even. Raises FloatingPointError in every process
    if `make` does so in one.
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
    outcome = _outcome(layers, own, made, collective)
    if error is not None:
        raise error
    if failed := [layer.label for layer, (*_, has_failed) in outcome.items() if has_failed]:
        raise FloatingPointError(f"another process cannot invert Σ, of {', '.join(failed)} or one")
    sent = _send(layers, owner, made, collective)
    return [
        (layer, InverseRoot(*sent[layer], int(n_failed), bool(is_damped_more)))
        for layer, (n_failed, is_damped_more, _) in outcome.items()
    ]


def owners_of(layers: list[Layer], size: int) -> dict[Layer, int]:
    """Which of `size` processes makes the P of each layer."""
    return dict(zip(layers, owners([_cost(each) for each in layers], size), strict=True))


def _cost(layer: Layer) -> float:
    shape = layer.sigma.shape
    return float(shape[0] if len(shape) == 1 else shape[0] * shape[-1] ** 3)


def _outcome(
    layers: list[Layer],
    own: list[Layer],
    made: dict[Layer, InverseRoot],
    collective: Collective,
) -> dict[Layer, list[float]]:
    """(inverses that failed, is it damped more, is there no P) of every layer, in all processes."""
    rows = {
        layer: [made[layer].n_failed, made[layer].is_damped_more, 0] if layer in made else [0, 0, 1]
        for layer in own
    }
    table = [rows.get(layer, [0, 0, 0]) for layer in layers]
    device = layers[0].sigma.device
    table = collective.sum_(torch.tensor(table, dtype=torch.float64, device=device))
    return dict(zip(layers, table.tolist(), strict=True))


def _send(
    layers: list[Layer],
    owner: dict[Layer, int],
    made: dict[Layer, InverseRoot],
    collective: Collective,
) -> dict[Layer, tuple[Tensor, Tensor, Tensor | None]]:
    """P, damping and U of every layer, from its owner; one message from each owner and dtype."""
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
        layer: (unpack(P, layer.P.shape), damping.clone(), _like(U, layer.deflation_basis))
        for layer, (P, damping, U) in parts
    }


def sent_sizes(layer: Layer) -> tuple[int, int, int]:
    """Numbers of P, damping and U in a message."""
    U = layer.deflation_basis
    return packed_numel(layer.P.shape), len(layer.damping), 0 if U is None else U.numel()


def _parts(made: InverseRoot) -> tuple[Tensor, Tensor, Tensor]:
    U = (
        made.damping.new_empty(0)
        if made.deflation_basis is None
        else made.deflation_basis.flatten()
    )
    return pack(made.P), made.damping, U


def _like(values: Tensor, U: Tensor | None) -> Tensor | None:
    return None if U is None else values.view(U.shape).clone()
