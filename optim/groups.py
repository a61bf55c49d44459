"""Assign a role to each parameter of a model; the role decides which optimizer trains it.

matrix     weight of a hidden linear layer, (d_out, d_in)
embedding  token or position embedding; a tied head is the same parameter
head       weight of `lm_head` if it is not tied
gain       1-D scale of a norm
bias       1-D offset of a linear layer or a norm
"""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

Role = Literal["matrix", "embedding", "head", "gain", "bias"]
HEAD = "lm_head"
QKV_BLOCKS = {"c_attn": 3}  # linear layers with fused weights: q, k and v stacked by rows


class ParamRole(NamedTuple):
    """A trainable parameter with its role."""

    name: str
    param: Tensor
    role: Role
    qkv_blocks: int  # number of matrices that are stacked by rows: 3 for fused q, k, v


def assign_roles(model: nn.Module) -> list[ParamRole]:
    """Return the role of each trainable parameter in the model's order, without duplicates.

    A parameter with several names (tied weights) has the role and the name of its embedding.

    Raises:
        ValueError: if some parameters have no role; the message lists their names and shapes.
    """
    roles: dict[Tensor, ParamRole] = {}
    unknown: list[str] = []
    for module_name, module in model.named_modules():
        for name, param in module.named_parameters(module_name, recurse=False):
            if not param.requires_grad:
                continue
            role = _role(module, module_name, name, param)
            if role is None:
                unknown.append(f"{name} {tuple(param.shape)}")
            elif param not in roles or role == "embedding":
                roles[param] = ParamRole(name, param, role, _qkv_blocks(module_name, param))
    if unknown:
        raise ValueError(
            f"no role for {', '.join(unknown)}; supported are the weights of nn.Linear (matrix, or "
            f"head for {HEAD}) and nn.Embedding, and 1-D parameters (bias or gain)"
        )
    return list(roles.values())


def _role(module: nn.Module, module_name: str, name: str, param: Tensor) -> Role | None:
    """Return the role of a parameter of `module`, or None if it has no role."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if param.ndim == 1:
        return "bias" if _last(name) == "bias" else "gain"
    if isinstance(module, nn.Linear):
        return "head" if _last(module_name) == HEAD else "matrix"
    return None


def _qkv_blocks(module_name: str, param: Tensor) -> int:
    """Return the number of matrices that are stacked in a parameter."""
    qkv_blocks = QKV_BLOCKS.get(_last(module_name), 1) if param.ndim == 2 else 1
    if param.shape[0] % qkv_blocks:
        raise ValueError(
            f"{module_name}: {param.shape[0]} rows; a layer of this name stacks {qkv_blocks} "
            f"matrices, so the number of rows must be divisible by {qkv_blocks}"
        )
    return qkv_blocks


def _last(name: str) -> str:
    """Return the last part of a dotted name."""
    return name.rpartition(".")[2]


def check_complete(model: nn.Module, param_groups: Iterable[dict[str, Any]]) -> None:
    """Check that every trainable parameter of `model` is in exactly one param group.

    Args:
        param_groups: the param groups of all optimizers of the model.
    Raises:
        ValueError: if a parameter is in no group or in several groups, or a group holds a tensor
            that is not a trainable parameter of the model.
    """
    names = {param: name for name, param in model.named_parameters() if param.requires_grad}
    counts = dict.fromkeys(names, 0)
    n_foreign = 0
    for group in param_groups:
        for param in group["params"]:
            n_foreign += param not in counts
            counts[param] = counts.get(param, 0) + 1
    missing = [name for param, name in names.items() if counts[param] == 0]
    repeated = [name for param, name in names.items() if counts[param] > 1]
    if missing or repeated or n_foreign:
        raise ValueError(
            "every trainable parameter must be in exactly one param group; "
            f"in none: {', '.join(missing) or '-'}; in several: {', '.join(repeated) or '-'}; "
            f"tensors that are not trainable parameters of the model: {n_foreign}"
        )
