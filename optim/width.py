"""The width rules of mup.py, put on the param groups of optimizers."""

from typing import Any

from torch.optim import Optimizer

from mup import MATRIX, WeightDecayScaling, decay_mult, eps_mult, update_mult


def follow_width(
    optimizer: Optimizer, m: float, wd_scaling: WeightDecayScaling, *, dopr: bool
) -> None:
    """Scale updates, decay and eps, in place, to a model of m times the width they are tuned at.

    The factor on updates is `lr_mult` where the optimizer knows it. torch's do not: it goes into
    `lr` and `base_lr`, and `weight_decay` is divided by it, so that lr · weight_decay is as asked.
    With m = 1 nothing changes. dopr: activation preconditioning is in front of it.
    """
    name = type(optimizer).__name__.lower()
    for group in optimizer.param_groups:
        rule, role = rule_of(name, group, dopr=dopr), group["role"]
        update = update_mult(rule, role, m)
        group["weight_decay"] *= decay_mult(wd_scaling, rule, role, m)
        if "lr_mult" in group:
            group["lr_mult"] *= update
        else:
            group["lr"] *= update
            group["base_lr"] *= update
            group["weight_decay"] /= update
        if "eps" in group:
            group["eps"] *= eps_mult(name, m)


def rule_of(name: str, group: dict[str, Any], *, dopr: bool) -> str:
    """The row of mup.MATRIX that a param group follows; Muon has one for each of its scales."""
    name = f"{name} {group['scale']}" if "scale" in group else name
    return f"dopr {name}" if dopr and f"dopr {name}" in MATRIX else name
