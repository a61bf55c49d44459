"""From an optimizer's name and its numbers to the list of optimizers that train a model."""

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .adamuon import AdaMuon
from .groups import ParamRole, Role, assign_roles, check_complete
from .kernels.dispatch import Backend
from .kernels.newton_schulz import NSCoefficients
from .muon import AdjustLR, IterationDtype, Muon
from .mup import WeightDecayScaling, follow_width
from .process_group import ProcessGroup, is_sharded
from .signum import Signum

OPTIMIZERS = ("adamw", "sgd", "signum", "muon", "adamuon")
MATRIX_OPTIMIZERS = ("muon", "adamuon")  # AdamW takes what is no matrix
AUX_LR = 6e-4  # the usual AdamW rate of GPT-2 124M
DECAYED_ROLES = ("matrix", "embedding", "head")  # all that is 2-D; gains and biases do not decay
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
    nesterov: bool = True,
    adjust_lr: AdjustLR = "match_rms_adamw",
    ns_coefficients: NSCoefficients = "polar_express",
    ns_steps: int = 5,
    ns_dtype: IterationDtype = "bfloat16",
    backend: Backend = "auto",
    process_group: ProcessGroup | None = None,
    width_mult: float = 1.0,
    wd_scaling: WeightDecayScaling = "independent",
    dopr: bool = False,
) -> list[torch.optim.Optimizer]:
    """The optimizers that together hold every trainable parameter of `model` exactly once.

        adamw, sgd, signum   one optimizer for everything
        muon, adamuon        it for the matrices; AdamW for embeddings, head, gains and biases

    Matrices, embeddings and head decay by `weight_decay`; gains and biases do not. AdamW and SGD
    are torch's, with `fused=True` (torch raises where a device has no fused kernel), but for SGD of
    sharded parameters (FSDP2), which has `foreach=True`: torch's fused one does not take them.
    SGD's decay is torch's, too: it is added to the gradient before the momentum.

    Every param group carries `base_lr`, which a schedule multiplies into `lr`, and `role`, `blocks`
    and `param_names`: plain values that pass through `state_dict`.

    Args:
        aux_lr: rate of the AdamW beside muon and adamuon; None: AUX_LR, whatever `lr` is, because a
            rate that suits one of the two says little about the other. None with other optimizers.
        beta1, beta2: of AdamW.
        eps: of AdamW and adamuon.
        momentum: of sgd, signum, muon, adamuon.
        nesterov: of muon and adamuon.
        adjust_lr: of muon.
        coefficients, ns_steps, ns_dtype, kernel, process_group: of muon and adamuon; see there.
        width_mult: m of mup.py, the width relative to the one that all these numbers suit.
        wd_scaling: how weight decay follows m; see mup.DECAY.
        dopr: whether the matrices' gradients will be preconditioned, which changes SGD's rule of m.
    Raises:
        ValueError: an unknown name, a number outside its range, an `aux_lr` that nothing would use,
            a parameter without a role, a kernel that cannot run.
    """
    _check_name(optimizer, aux_lr)
    adam: dict[str, Any] = {"betas": (beta1, beta2), "eps": eps, "fused": True}
    matrix: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
    matrix |= {"ns_coefficients": ns_coefficients, "ns_dtype": ns_dtype, "backend": backend}
    matrix |= {"process_group": process_group}
    is_foreach = any(map(is_sharded, model.parameters()))
    sgd = {"momentum": momentum, "foreach": is_foreach, "fused": not is_foreach}
    make: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
        "adamw": lambda groups: torch.optim.AdamW(groups, **adam),
        "sgd": lambda groups: torch.optim.SGD(groups, **sgd),
        "signum": lambda groups: Signum(groups, momentum=momentum),
        "muon": lambda groups: Muon(groups, adjust_lr=adjust_lr, **matrix),
        "adamuon": lambda groups: AdaMuon(groups, eps=eps, **matrix),
    }
    rows = assign_roles(model)
    takes_all = optimizer not in MATRIX_OPTIMIZERS
    own = [row for row in rows if takes_all or row.role == "matrix"]
    rest = [row for row in rows if not takes_all and row.role != "matrix"]
    optimizers = [make[optimizer](_param_groups(own, lr, weight_decay))]
    if rest:
        rate = AUX_LR if aux_lr is None else aux_lr
        optimizers.append(make["adamw"](_param_groups(rest, rate, weight_decay)))
    for each in optimizers:
        follow_width(each, width_mult, wd_scaling, dopr=dopr)
    check_complete(model, [group for each in optimizers for group in each.param_groups])
    return optimizers


def _check_name(optimizer: str, aux_lr: float | None) -> None:
    if optimizer not in OPTIMIZERS:
        close = difflib.get_close_matches(optimizer, OPTIMIZERS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"optimizer={optimizer!r}: must be one of {', '.join(OPTIMIZERS)}{hint}")
    if aux_lr is not None and optimizer not in MATRIX_OPTIMIZERS:
        raise ValueError(
            f"aux_lr={aux_lr}: optimizer={optimizer!r} has no auxiliary AdamW; leave aux_lr unset "
            f"(it belongs to {' and '.join(MATRIX_OPTIMIZERS)})"
        )


def _param_groups(rows: list[ParamRole], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """One param group per role and number of blocks, in order of first appearance."""
    members: dict[tuple[Role, int], list[tuple[str, Tensor]]] = defaultdict(list)
    for row in rows:
        members[row.role, row.qkv_blocks].append((row.name, row.param))
    return [
        {
            "params": named_params,
            "role": role,
            "qkv_blocks": qkv_blocks,
            "lr": lr,
            "base_lr": lr,
            "weight_decay": weight_decay if role in DECAYED_ROLES else 0.0,
        }
        for (role, qkv_blocks), named_params in members.items()
    ]


def describe_groups(optimizers: Iterable[torch.optim.Optimizer]) -> str:
    """One table of all parameters; those that differ only in the number of their layer share a row.

    `lr` is the peak rate, base_lr times lr_mult.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group["base_lr"] * group.get("lr_mult", 1.0)
            decay = f"{group['weight_decay']:g}"
            kind = (group["role"], type(optimizer).__name__, f"{rate:g}", decay)
            for name, param in zip(group["param_names"], group["params"], strict=True):
                layer = re.sub(r"\.\d+\.", ".*.", name)
                shape = " x ".join(map(str, param.shape))
                counts[(layer, shape, *kind)] += 1
    rows = [COLUMNS, *((*row, str(count)) for row, count in counts.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)
