"""What each parameter of a model is (its role), which decides who optimizes it and how.

matrix     weight of a hidden linear layer, (d_out, d_in)
embedding  table of token or position vectors; a head tied to it is the same parameter
head       weight of `lm_head`, where it is not tied
gain       1-D scale of a norm
bias       1-D offset of a linear layer or a norm
"""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

Role = Literal["matrix", "embedding", "head", "gain", "bias"]
HEAD = "lm_head"
FUSED_BLOCKS = {"c_attn": 3}  # linear layers whose rows stack several matrices: q, k, v


class ParamRole(NamedTuple):
    """One trainable parameter."""

    name: str
    param: Tensor
    role: Role
    qkv_blocks: int  # equal row blocks that are matrices of their own: 3 for fused q, k, v


def assign_roles(model: nn.Module) -> list[ParamRole]:
    """One row per trainable parameter, in the model's order; a shared parameter appears once.

    A parameter with several names (tied weights) has the role and the name of its embedding.

    Raises:
        ValueError: parameters that fit no role, all of them by name and shape.
    """
    rows: dict[Tensor, ParamRole] = {}
    unknown: list[str] = []
    for module_name, module in model.named_modules():
        for name, param in module.named_parameters(module_name, recurse=False):
            if not param.requires_grad:
                continue
            role = _role(module, module_name, name, param)
            if role is None:
                unknown.append(f"{name} {tuple(param.shape)}")
            elif param not in rows or role == "embedding":
                rows[param] = ParamRole(name, param, role, _blocks(module_name, param))
    if unknown:
        raise ValueError(
            f"no role for {', '.join(unknown)}; wanted weights of nn.Linear (matrix, {HEAD}: head) "
            "and nn.Embedding, 1-D biases, and other 1-D weights (gains)"
        )
    return list(rows.values())


def _role(module: nn.Module, module_name: str, name: str, param: Tensor) -> Role | None:
    """The role of a parameter that `module` owns, or None."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if param.ndim == 1:
        return "bias" if _last(name) == "bias" else "gain"
    if isinstance(module, nn.Linear):
        return "head" if _last(module_name) == HEAD else "matrix"
    return None


def _blocks(module_name: str, param: Tensor) -> int:
    qkv_blocks = FUSED_BLOCKS.get(_last(module_name), 1) if param.ndim == 2 else 1
    if param.shape[0] % qkv_blocks:
        raise ValueError(
            f"{module_name}: {param.shape[0]} rows; a fused layer of this name stacks {qkv_blocks} "
            "matrices, so its rows must be divisible by that"
        )
    return qkv_blocks


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def check_complete(model: nn.Module, param_groups: Iterable[dict[str, Any]]) -> None:
    """Every trainable parameter of `model` is in exactly one of the groups of all its optimizers.

    Raises:
        ValueError: the names of the parameters that are in none or in several, or the number of
            tensors that are not trainable parameters of the model.
    """
    names = {param: name for name, param in model.named_parameters() if param.requires_grad}
    counts = dict.fromkeys(names, 0)
    strangers = 0
    for group in param_groups:
        for param in group["params"]:
            strangers += param not in counts
            counts[param] = counts.get(param, 0) + 1
    missing = [name for param, name in names.items() if counts[param] == 0]
    repeated = [name for param, name in names.items() if counts[param] > 1]
    if missing or repeated or strangers:
        raise ValueError(
            "every trainable parameter must be in exactly one group; "
            f"in none: {', '.join(missing) or '-'}; in several: {', '.join(repeated) or '-'}; "
            f"tensors that are no trainable parameter of the model: {strangers}"
        )
