"""Decide which processes hold the statistics of each layer.

    replicated    every process holds Σ, P and the running sums of all layers
    sharded       one process, the layer's owner, holds them

Statistics are sharded over the processes that hold one copy of the weights. With several such sets
of processes (HSDP), each set holds all statistics once. Embeddings, whose Σ is a vector, are always
replicated, and so are the means.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..process_group import Collective, is_sharded, n_processes, owners, row_mesh_dim
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


def shares_statistics(statistics: Sharing, covered: Sequence[CoveredLayer]) -> bool:
    """Return whether the statistics are sharded. "auto": if all covered weights are."""
    if n_processes() == 1 or statistics == "replicated":
        return False
    return statistics == "sharded" or all(is_sharded(each.weight) for each in covered)


def share(layers: Sequence[Layer], everybody: Collective, statistics: Sharing) -> Processes:
    """Let every layer hold its statistics here or leave them to its owner; return the processes.

    All processes must call this together, after the weights were sharded.

    Raises:
        ValueError: if statistics="sharded" and the weights are sharded in several ways, or not over
            all of the processes.
    """
    covered = [layer.covered for layer in layers]
    processes = Processes.of(everybody)
    is_shared = everybody.size > 1 and shares_statistics(statistics, covered)
    if is_shared:
        meshes = [_mesh_of(each.weight) for each in covered]
        if problem := _problem(meshes, covered[0].weight, everybody.size):
            if statistics == "sharded":
                raise ValueError(f"statistics='sharded': {problem}; use statistics='replicated'")
            is_shared = False
        else:
            processes = Processes.of(everybody, meshes[0])
    matrices = [layer for layer in layers if not layer.covered.is_diagonal]
    owner = owners_of(matrices, processes.shards.size) if is_shared else {}
    for layer in layers:
        layer.hold(owner.get(layer), processes.shards.rank)
    return processes


def _mesh_of(weight: Any) -> Any:
    """Return the mesh over which the rows of a weight are sharded, or None."""
    return None if row_mesh_dim(weight) is None else weight.device_mesh


def _problem(meshes: list[Any], weight: Any, size: int) -> str:
    """Return why statistics cannot be sharded over these meshes, one per weight, or "".

    Args:
        weight: the first of the weights.
        size: number of processes that train the model.
    """
    mesh = meshes[0]
    if any(each != mesh for each in meshes):
        return "the covered weights are sharded over different processes"
    if mesh is None:
        return ""
    is_known = mesh.ndim <= 2 and row_mesh_dim(weight) == mesh.ndim - 1
    if mesh.size() != size or not is_known:
        return f"the weights are sharded over {mesh}, but {size} processes train the model"
    return ""


def owners_of(layers: list[Layer], size: int) -> dict[Layer, int]:
    """Return which of `size` processes computes the P of each layer."""
    return dict(zip(layers, owners([_cost(each) for each in layers], size), strict=True))


def held(layers: Iterable[Layer]) -> list[Layer]:
    """Return the layers whose statistics this process holds."""
    return [layer for layer in layers if layer.is_held]


def _cost(layer: Layer) -> float:
    """Estimate the work of computing P, up to a constant factor."""
    shape = layer.shape
    return float(shape[0] if len(shape) == 1 else shape[0] * shape[-1] ** 3)
