"""Decide which processes hold the statistics of each layer.

    replicated    every process holds Σ, P and the running sums of all layers
    sharded       one process, the layer's owner, holds them

Statistics are sharded over the processes that hold one copy of the weights. With several such sets
of processes (HSDP), each set holds all statistics once. Embeddings, whose Σ is a vector, are always
replicated, and so are the means.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import distributed

from ..process_group import (
    Collective,
    is_sharded,
    last_mesh_ranks,
    n_processes,
    owners,
    row_mesh_dim,
)
from .coverage import CoveredLayer
from .layer import Layer
from .settings import Sharing


class Processes(NamedTuple):
    """The processes that train one model, and their part in holding the statistics."""

    everybody: Collective
    shards: Collective  # together they hold all sharded statistics
    replicas: Collective  # they hold the same ones, each for another set of `shards`

    @classmethod
    def of(cls, everybody: Collective, mesh: Any = None) -> Processes:
        """Return the processes; without a mesh, all of them hold a part of the statistics."""
        if mesh is None or mesh.ndim == 1:
            return cls(everybody, everybody, Collective())
        replicas, shards = (Collective(mesh.get_group(dim)) for dim in range(2))  # as FSDP2 has it
        return cls(everybody, shards, replicas)


def check_group(group: Collective, covered: Iterable[CoveredLayer]) -> None:
    """Raise ValueError if a weight is sharded over processes that are not in the group."""
    weights: dict[str, Any] = {x.full_name: x.weight for x in covered if is_sharded(x.weight)}
    if not weights:
        return
    inside = {*distributed.get_process_group_ranks(group.group)} if group.group else {0}
    meshes = {weight.device_mesh: name for name, weight in weights.items()}
    for mesh, name in meshes.items():
        if outside := {*mesh.mesh.flatten().tolist()} - inside:
            raise ValueError(
                f"{name} is sharded over processes {sorted(outside)}, which are not in the process "
                "group: pass a process_group of all processes that train this layer together"
            )


def shares_statistics(statistics: Sharing, covered: Sequence[CoveredLayer]) -> bool:
    """Return whether the statistics are sharded. "auto": if all covered weights are."""
    if n_processes() == 1 or statistics == "replicated":
        return False
    return statistics == "sharded" or all(is_sharded(each.weight) for each in covered)


def share(layers: Sequence[Layer], everybody: Collective, statistics: Sharing) -> Processes:
    """Let every layer hold its statistics here or leave them to its owner; return the processes.

    All processes must call this together, after the weights were sharded.

    Raises:
        ValueError: if statistics="sharded" and the weights are sharded in several ways, not by rows
            alone, or not over all of the processes.
    """
    covered = [layer.covered for layer in layers]
    processes = Processes.of(everybody)
    is_shared = everybody.size > 1 and shares_statistics(statistics, covered)
    if is_shared:
        try:
            processes = Processes.of(everybody, _mesh_of(covered, everybody.size))
        except ValueError as error:
            if statistics == "sharded":
                message = f"statistics='sharded': {error}; use statistics='replicated'"
                raise ValueError(message) from None
            is_shared = False
    matrices = [layer for layer in layers if not layer.covered.is_diagonal]
    owner = layer_owners(matrices, processes.shards.size) if is_shared else {}
    for layer in layers:
        layer.hold(owner.get(layer), processes.shards.rank)
    return processes


def _mesh_of(covered: Sequence[CoveredLayer], size: int) -> Any:
    """Return the mesh over which the rows of all weights are sharded; None if they are whole.

    Args:
        size: number of processes that train the model.
    Raises:
        ValueError: if there is no such mesh of at most two dimensions, the last of which shards.
    """
    weights: list[Any] = [each.weight for each in covered]
    dims = [*map(row_mesh_dim, weights)]
    meshes = [None if d is None else w.device_mesh for w, d in zip(weights, dims, strict=True)]
    mesh, dim = meshes[0], dims[0]
    if any(each != mesh for each in meshes) or any(each != dim for each in dims):
        raise ValueError("the covered weights are sharded over different processes")
    if mesh is not None and (mesh.size() != size or (mesh.ndim, dim) not in ((1, 0), (2, 1))):
        raise ValueError(
            f"the weights are sharded over {mesh}, but {size} processes train the model"
        )
    return mesh


def share_tokens(layers: Iterable[Layer]) -> None:
    """Let one process of each tensor-parallel group count a layer's tokens, with even work."""
    together: dict[tuple[int, ...], list[Layer]] = defaultdict(list)
    for layer in layers:
        if is_sharded(layer.covered.weight):
            together[last_mesh_ranks(layer.covered.weight)].append(layer)
    for ranks, members in together.items():
        costs = [float(math.prod(layer.shape)) for layer in members]
        for layer, chosen in zip(members, owners(costs, len(ranks)), strict=True):
            layer.capture.share_tokens(ranks, ranks[chosen])


def layer_owners(layers: list[Layer], size: int) -> dict[Layer, int]:
    """Return which of `size` processes computes the P of each layer."""
    return dict(zip(layers, owners([_cost(each) for each in layers], size), strict=True))


def held(layers: Iterable[Layer]) -> list[Layer]:
    """Return the layers whose statistics this process holds."""
    return [layer for layer in layers if layer.is_held]


def _cost(layer: Layer) -> float:
    """Estimate the work of computing P, up to a constant factor."""
    shape = layer.shape
    return float(shape[0] if len(shape) == 1 else shape[0] * shape[-1] ** 3)
