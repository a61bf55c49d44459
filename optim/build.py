"""Build the optimizers that train a model from a name and its settings.

The name is one of OPTIMIZERS, whose settings are arguments of `build_optimizers`, or that of any
other class (third_party.py), whose arguments are given as text.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .adamuon import AdaMuon
from .groups import ParamRole, Role, assign_roles, check_complete
from .kernels.dispatch import Backend
from .kernels.newton_schulz import NSCoefficients
from .muon import AdjustLR, IterationDtype, Muon
from .mup import ADAM_LIKE, WeightDecayScaling, scale_to_width
from .probe import (
    check,
    has_decoupled_decay,
    has_flat_state,
    is_elementwise,
    is_scale_invariant,
)
from .process_group import ProcessGroup, is_sharded
from .signum import Signum
from .third_party import UNSHARDED, Roles, ThirdParty, find, is_third_party

CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "signum": Signum,
    "muon": Muon,
    "adamuon": AdaMuon,
}
OPTIMIZERS = tuple(CLASSES)
MATRIX_OPTIMIZERS = ("muon", "adamuon")  # AdamW trains the parameters that are not matrices
AUX_LR = 6e-4  # the usual AdamW learning rate of GPT-2 124M
DECAYED_ROLES = ("matrix", "embedding", "head")  # the 2-D parameters; gains and biases do not decay
COLUMNS = ("parameter", "shape", "role", "optimizer", "lr", "weight decay", "count")


def build_optimizers(
    model: nn.Module,
    *,
    optimizer: str,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    momentum: float,
    aux_lr: float | None = None,
    embedding_lr: float | None = None,
    optimizer_args: str = "",
    optimizer_roles: Roles = "auto",
    nesterov: bool = True,
    adjust_lr: AdjustLR = "match_rms_adamw",
    ns_coefficients: NSCoefficients = "polar_express",
    ns_dtype: IterationDtype = "auto",
    backend: Backend = "auto",
    process_group: ProcessGroup | None = None,
    width_mult: float = 1.0,
    wd_scaling: WeightDecayScaling = "independent",
    dopr: bool = False,
) -> list[torch.optim.Optimizer]:
    """Return optimizers that together hold every trainable parameter of `model` exactly once.

        adamw, sgd, signum   one optimizer for all parameters
        muon, adamuon        one optimizer for the matrices, AdamW for all other parameters
        any other class      one of the two; see optimizer_roles

    Weight decay applies to matrices, embeddings and head, not to gains and biases; classes without
    weight decay train without it. The decay of torch's SGD is not decoupled: it is added to the
    gradient before the momentum. Other classes do one or the other. AdamW and SGD run fused (torch
    raises if a device has no fused kernel). SGD of sharded parameters (FSDP2) runs with
    `foreach=True`, because fused SGD does not support them.

    Every param group has the keys `base_lr`, which the schedule multiplies into `lr`, `role`,
    `qkv_blocks` and `param_names`. These are plain values that `state_dict` keeps.

    Args:
        aux_lr: learning rate of the AdamW beside an optimizer of matrices. Defaults to AUX_LR,
            whatever `lr` is. Must be None if there is no such AdamW.
        embedding_lr: learning rate of the embeddings; a tied one is also the output head. Defaults
            to that of the optimizer that holds them.
        optimizer_args: arguments of a class that is not one of OPTIMIZERS, `name=value, ...`.
        optimizer_roles: the parameters that such a class trains: only the matrices, or all. "auto"
            decides by FOR_MATRICES in third_party.py.
        beta1, beta2: for AdamW.
        eps: for AdamW and adamuon.
        momentum: for sgd, signum, muon and adamuon.
        nesterov, ns_coefficients, ns_dtype, backend, process_group: for muon and adamuon; see
            `Muon`.
        adjust_lr: for muon.
        width_mult: the width relative to the base width for which the settings are tuned.
        wd_scaling: how the weight decay depends on the width; see DECAY in mup.py.
        dopr: whether activation preconditioning runs before the optimizer of the matrices, which
            changes the width rule of SGD.
    Raises:
        ValueError: if a name is unknown, a number is out of range, `aux_lr` is set but has no
            effect, a parameter has no role, the backend cannot run, or a class that is not one of
            OPTIMIZERS does not support what is asked of it (see `problems_of`).
    """
    third = third_party(optimizer, optimizer_args, optimizer_roles)
    if aux_lr is not None and not has_aux(optimizer, third):
        raise ValueError(_no_aux(optimizer, aux_lr))
    is_foreach = any(map(is_sharded, model.parameters()))
    adamw = {"betas": (beta1, beta2), "eps": eps, "fused": True}
    matrix = {
        **{"momentum": momentum, "nesterov": nesterov},
        **{"ns_coefficients": ns_coefficients, "ns_dtype": ns_dtype},
        **{"backend": backend, "process_group": process_group},
    }
    settings: dict[str, dict[str, Any]] = {
        "adamw": adamw,
        "sgd": {"momentum": momentum, "foreach": is_foreach, "fused": not is_foreach},
        "signum": {"momentum": momentum},
        "muon": {"adjust_lr": adjust_lr, **matrix},
        "adamuon": {"eps": eps, **matrix},
    }
    main, aux = _split_params(model, optimizer, third)
    groups = _param_groups(main, lr, embedding_lr, weight_decay)
    if third:
        asked = {"is_sharded": is_foreach, "is_wider": width_mult != 1}
        if problems := problems_of(third, **asked, weight_decay=weight_decay):
            raise ValueError("; ".join(problems))
        optimizers = [third.build(groups)]
    else:
        optimizers = [CLASSES[optimizer](groups, **settings[optimizer])]
    if aux:
        lr = AUX_LR if aux_lr is None else aux_lr
        groups = _param_groups(aux, lr, embedding_lr, weight_decay)
        optimizers.append(torch.optim.AdamW(groups, **adamw))
    for built in optimizers:
        rule = ADAM_LIKE if is_third_party(built) else type(built).__name__.lower()
        scale_to_width(built, width_mult, wd_scaling, rule=rule, dopr=dopr)
    check_complete(model, [group for built in optimizers for group in built.param_groups])
    return optimizers


@cache
def third_party(optimizer: str, arguments: str = "", roles: Roles = "auto") -> ThirdParty | None:
    """Return the class with that name, which was tried out; None for one of OPTIMIZERS.

    Raises:
        ValueError: see `find` and `check`; or `arguments` or `roles` are given for one of
            OPTIMIZERS.
    """
    if optimizer not in OPTIMIZERS and optimizer.lower() in OPTIMIZERS:
        raise ValueError(
            f"optimizer={optimizer!r}: write {optimizer.lower()} for ours, to which the settings "
            f"beta1 to nesterov belong, or torch:{optimizer}"
        )
    if optimizer in OPTIMIZERS:
        for key, value, default in (("args", arguments, ""), ("roles", roles, "auto")):
            if value != default:
                raise ValueError(
                    f"optimizer_{key}={value!r}: has no effect on optimizer={optimizer}, which has "
                    f"settings of its own; it is for other classes, such as torch:{optimizer}"
                )
        return None
    third = find(optimizer, arguments, roles)
    check(third)
    return third


def problems_of(
    third: ThirdParty, *, is_sharded: bool, is_wider: bool, weight_decay: float = 0.0
) -> list[str]:
    """Return why a class cannot train shards (FSDP2) or a width other than the base's (muP)."""
    where, problems = f"optimizer={third.name}", []
    if is_sharded and (problem := _shard_problem(third)):
        problems.append(f"{where}: {problem} use parallel=ddp")
    if is_wider and not (is_elementwise(third) and is_scale_invariant(third)):
        problems.append(
            f"{where}: its muP rule is not known (it is for elementwise updates that do not depend "
            "on the scale of the gradient, as Adam's and Lion's); use mup=false"
        )
    elif is_wider and weight_decay and third.has_weight_decay and not has_decoupled_decay(third):
        problems.append(
            f"{where}: muP scales decoupled weight decay, and that of this class is not; use "
            "mup=false, or an argument of the class that decouples it"
        )
    return problems


def _shard_problem(third: ThirdParty) -> str:
    """Return why a class cannot train shards, or ""."""
    if not is_elementwise(third):
        return (
            "the update of an entry depends on other entries of the weight, which may be in other "
            "processes;"
        )
    works_without_foreach = UNSHARDED.get(third.kind.__name__.lower())
    if works_without_foreach is not None:
        if not works_without_foreach:
            return "torch has not all of its operations for shards (DTensor);"
        if third.arguments.get("foreach") is not False:
            return "it trains shards only with --optimizer_args=foreach=false; or"
    if not has_flat_state(third):
        return "its state of a parameter is nested, and cannot be sharded when a run resumes;"
    return ""


def has_aux(optimizer: str, third: ThirdParty | None) -> bool:
    """Whether an AdamW trains the parameters that are not matrices."""
    return third.is_for_matrices if third else optimizer in MATRIX_OPTIMIZERS


def _no_aux(optimizer: str, aux_lr: float) -> str:
    return (
        f"aux_lr={aux_lr}: optimizer={optimizer!r} has no auxiliary AdamW; leave aux_lr unset "
        f"(only {', '.join(MATRIX_OPTIMIZERS)} and other optimizers of matrices use it)"
    )


def _split_params(
    model: nn.Module, optimizer: str, third: ThirdParty | None
) -> tuple[list[ParamRole], list[ParamRole]]:
    """Return the parameters of the main optimizer and those of the auxiliary AdamW."""
    params = assign_roles(model)
    if not has_aux(optimizer, third):
        return params, []
    matrices = [param for param in params if param.role == "matrix"]
    return matrices, [param for param in params if param.role != "matrix"]


def _param_groups(
    params: list[ParamRole], lr: float, embedding_lr: float | None, weight_decay: float
) -> list[dict[str, Any]]:
    """Return one param group per role and `qkv_blocks`, in the order of first appearance."""
    members: dict[tuple[Role, int], list[tuple[str, Tensor]]] = defaultdict(list)
    for each in params:
        members[each.role, each.qkv_blocks].append((each.name, each.param))
    groups = []
    for (role, qkv_blocks), named_params in members.items():
        own_lr = embedding_lr if role == "embedding" and embedding_lr is not None else lr
        group = {"params": named_params, "role": role, "qkv_blocks": qkv_blocks}
        group |= {"lr": own_lr, "base_lr": own_lr}
        group["weight_decay"] = weight_decay if role in DECAYED_ROLES else 0.0
        groups.append(group)
    return groups


def describe_groups(optimizers: Iterable[torch.optim.Optimizer]) -> str:
    """Return a table of all parameters, with one row for the same parameter of all layers.

    The column lr holds the peak learning rate, base_lr times lr_mult. The weight decay is "none" if
    the optimizer has no such setting.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            peak_lr = group["base_lr"] * group.get("lr_mult", 1.0)
            decay = f"{group['weight_decay']:g}" if "weight_decay" in group else "none"
            settings = (group["role"], type(optimizer).__name__, f"{peak_lr:g}", decay)
            for name, param in zip(group["param_names"], group["params"], strict=True):
                pattern = re.sub(r"\.\d+\.", ".*.", name)
                shape = " x ".join(map(str, param.shape))
                counts[(pattern, shape, *settings)] += 1
    rows = [COLUMNS, *((*row, str(count)) for row, count in counts.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)
