"""Build the optimizers that train a model from a name and its settings."""

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .adamuon import AdaMuon
from .groups import ParamRole, Role, assign_roles, check_complete
from .kernels.dispatch import Backend
from .kernels.newton_schulz import NSCoefficients
from .muon import AdjustLR, IterationDtype, Muon
from .mup import WeightDecayScaling, scale_to_width
from .process_group import ProcessGroup, is_sharded
from .signum import Signum

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
    nesterov: bool = True,
    adjust_lr: AdjustLR = "match_rms_adamw",
    ns_coefficients: NSCoefficients = "polar_express",
    ns_dtype: IterationDtype = "bfloat16",
    backend: Backend = "auto",
    process_group: ProcessGroup | None = None,
    width_mult: float = 1.0,
    wd_scaling: WeightDecayScaling = "independent",
    dopr: bool = False,
) -> list[torch.optim.Optimizer]:
    """Return optimizers that together hold every trainable parameter of `model` exactly once.

        adamw, sgd, signum   one optimizer for all parameters
        muon, adamuon        one optimizer for the matrices, AdamW for all other parameters

    Weight decay applies to matrices, embeddings and head, not to gains and biases. The decay of
    torch's SGD is not decoupled: it is added to the gradient before the momentum. AdamW and SGD
    run fused (torch raises if a device has no fused kernel). SGD of sharded parameters (FSDP2) runs
    with `foreach=True`, because fused SGD does not support them.

    Every param group has the keys `base_lr`, which the schedule multiplies into `lr`, `role`,
    `qkv_blocks` and `param_names`. These are plain values that `state_dict` keeps.

    Args:
        aux_lr: learning rate of the AdamW beside muon and adamuon. Defaults to AUX_LR, whatever
            `lr` is. Must be None for other optimizers.
        embedding_lr: learning rate of the embeddings; a tied one is also the output head. Defaults
            to that of the optimizer that holds them.
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
            effect, a parameter has no role, or the backend cannot run.
    """
    _check_name(optimizer, aux_lr)
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
    main, aux = _split_params(model, optimizer)
    groups = _param_groups(main, lr, embedding_lr, weight_decay)
    optimizers = [CLASSES[optimizer](groups, **settings[optimizer])]
    if aux:
        lr = AUX_LR if aux_lr is None else aux_lr
        groups = _param_groups(aux, lr, embedding_lr, weight_decay)
        optimizers.append(torch.optim.AdamW(groups, **adamw))
    for built in optimizers:
        scale_to_width(built, width_mult, wd_scaling, dopr=dopr)
    check_complete(model, [group for built in optimizers for group in built.param_groups])
    return optimizers


def _check_name(optimizer: str, aux_lr: float | None) -> None:
    if optimizer not in OPTIMIZERS:
        close = difflib.get_close_matches(optimizer, OPTIMIZERS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"optimizer={optimizer!r}: must be one of {', '.join(OPTIMIZERS)}{hint}")
    if aux_lr is not None and optimizer not in MATRIX_OPTIMIZERS:
        raise ValueError(
            f"aux_lr={aux_lr}: optimizer={optimizer!r} has no auxiliary AdamW; leave aux_lr unset "
            f"(only {' and '.join(MATRIX_OPTIMIZERS)} use it)"
        )


def _split_params(model: nn.Module, optimizer: str) -> tuple[list[ParamRole], list[ParamRole]]:
    """Return the parameters of the main optimizer and those of the auxiliary AdamW."""
    params = assign_roles(model)
    if optimizer not in MATRIX_OPTIMIZERS:
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

    The column lr holds the peak learning rate, base_lr times lr_mult.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            peak_lr = group["base_lr"] * group.get("lr_mult", 1.0)
            decay = f"{group['weight_decay']:g}"
            settings = (group["role"], type(optimizer).__name__, f"{peak_lr:g}", decay)
            for name, param in zip(group["param_names"], group["params"], strict=True):
                pattern = re.sub(r"\.\d+\.", ".*.", name)
                shape = " x ".join(map(str, param.shape))
                counts[(pattern, shape, *settings)] += 1
    rows = [COLUMNS, *((*row, str(count)) for row, count in counts.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)
