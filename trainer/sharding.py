"""How a model and its tensors lie on several processes: whole, or by rows (FSDP2).

A tensor whose rows are spread is a DTensor. What is of torch.distributed is imported when it is
needed: one process never pays for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn


def make_mesh(kind: str, size: int, shard_size: int | None, timeout: timedelta) -> Any:
    """The processes as (size,), or as (copies, shard_size), a copy in consecutive processes."""
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
    """The elements of every nn.ModuleList: what repeats in a model."""
    for stack in [each for each in model.modules() if isinstance(each, nn.ModuleList)]:
        yield from stack


def shard(model: nn.Module, mesh: Any) -> None:
    """Leave every process some rows of every parameter; new Parameter objects take their places.

    For a forward or backward the blocks are gathered one at a time, what is left all together.
    """
    from torch.distributed.fsdp import fully_shard

    for block in transformer_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def gathered(model: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    """What `make` makes, with all weights of a sharded model. All processes must call this."""
    with torch.device("meta"):
        whole = make()
    whole.load_state_dict({k: full(v) for k, v in model.state_dict().items()}, assign=True)
    return whole


def full(tensor: Any) -> Tensor:
    """All of a tensor, whose rows may be spread over processes (a DTensor): all must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def laid_out(whole: Any, like: Any) -> Tensor:
    """The part that belongs where `like` lies of `whole`, which all processes have, or can read."""
    if not isinstance(whole, Tensor):
        return whole.read(like)
    if not hasattr(like, "placements"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
