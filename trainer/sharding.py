"""Shard models and tensors by rows over processes with FSDP2, and gather them again.

A sharded tensor is a DTensor. The parts of torch.distributed are imported in the functions that
need them, so that a single process does not import them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn


def make_mesh(kind: str, size: int, shard_size: int | None, timeout: timedelta) -> Any:
    """Create a device mesh of shape (size,), or (size / shard_size, shard_size) for hsdp.

    The processes that hold one copy of the model have consecutive ranks.
    """
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    if shard_size is None:
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    ranks = torch.arange(size).view(-1, shard_size)
    groups: Any = [
        distributed.new_subgroups_by_enumeration(lists.tolist(), timeout=timeout)[0]
        for lists in (ranks.T, ranks)
    ]
    names = ("replicate", "shard")
    return DeviceMesh.from_group(groups, kind, mesh=ranks, mesh_dim_names=names)


def transformer_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the elements of every nn.ModuleList in the model."""
    for stack in [each for each in model.modules() if isinstance(each, nn.ModuleList)]:
        yield from stack


def shard(model: nn.Module, mesh: Any) -> None:
    """Shard every parameter of `model` by rows, in place. The Parameter objects are replaced.

    FSDP2 gathers the weights of one transformer block at a time, and the other weights together.
    The shards of a model on the meta device are allocated, with arbitrary values.
    """
    from torch.distributed.fsdp import fully_shard

    for block in transformer_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=mesh.device_type)


def full_model(model: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    """Return a model built by `make` with all weights of the sharded `model`.

    This is a collective: all processes must call it.
    """
    with torch.device("meta"):
        copy = make()
    copy.load_state_dict({k: full_tensor(v) for k, v in model.state_dict().items()}, assign=True)
    return copy


def full_tensor(tensor: Any) -> Tensor:
    """Return all rows of a tensor that may be sharded (a DTensor).

    This is a collective: all processes must call it.
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(source: Any, like: Any) -> Tensor:
    """Return the part of `source` that this process holds if `source` is sharded like `like`.

    Args:
        source: the full tensor, which all processes have, or a `StoredTensor` that all can read.
        like: a tensor or DTensor of the same shape.
    """
    if not isinstance(source, Tensor):
        return source.read(like)
    if not hasattr(like, "placements"):
        return source
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(source, like.device_mesh, like.placements, src_data_rank=None)
