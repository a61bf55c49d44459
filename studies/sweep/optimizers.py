"""Build and step the optimizers of a variant, for models that train.py does not train."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from optim.build import AUX_LR, MATRIX_OPTIMIZERS, OPTIMIZERS, build_optimizers
from optim.dopr.preconditioner import ActivationPreconditioner
from optim.probe import seed_all
from trainer.presets import DOPR_KEYS, READERS
from trainer.settings import FIELDS

NUMBERS: dict[str, Any] = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "momentum": 0.95}
DOPR: dict[str, Any] = {"gamma": FIELDS["gamma"].default}


def build(
    model: nn.Module,
    optimizer: str,
    lr: float,
    dopr: dict[str, Any],
    optimizer_args: str = "",
    own_lr: Mapping[str, float] | None = None,
) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a model, without weight decay.

    The generators that other classes may draw from begin with the same seed in every run.

    Args:
        optimizer, optimizer_args: see `optim.build`. Ours have the defaults of train.py.
        dopr: settings of ActivationPreconditioner. Without any, the gradients are not
            preconditioned. gamma defaults to that of train.py.
        own_lr: {name of a parameter: its learning rate}, where that is not `lr`.
    """
    optimizers = build_optimizers(
        model,
        optimizer=optimizer,
        optimizer_args=optimizer_args,
        lr=lr,
        weight_decay=0.0,
        **NUMBERS,
    )
    for name, rate in (own_lr or {}).items():
        _set_lr(optimizers, name, rate)
    if optimizer not in OPTIMIZERS:
        seed_all(0)
    if dopr:
        precondition(model, optimizers, dopr)
    return optimizers


def precondition(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], dopr: dict[str, Any]
) -> ActivationPreconditioner:
    """Attach a preconditioner with these settings to the optimizers, and return it."""
    return ActivationPreconditioner(model, **DOPR | dopr).attach(*optimizers)


def default_settings(optimizer: str, has_dopr: bool) -> dict[str, Any]:
    """Return what `build` gives an optimizer of ours, and DoPr, where nothing else is asked for.

    Recorded with a run, so that another default of a later release does not pass for the same run.
    """
    parameters = inspect.signature(build_optimizers).parameters
    read = [key for key, readers in READERS.items() if optimizer in readers]
    found = {key: NUMBERS.get(key, parameters[key].default) for key in read}
    if optimizer in MATRIX_OPTIMIZERS:
        found["aux_lr"] = AUX_LR
    if has_dopr:
        parameters = inspect.signature(ActivationPreconditioner).parameters
        found |= {key: parameters[key].default for key in DOPR_KEYS} | DOPR
    return found


def _set_lr(optimizers: list[torch.optim.Optimizer], name: str, lr: float) -> None:
    """Give a parameter a learning rate of its own, in a param group of its own."""
    for each in optimizers:
        for group in each.param_groups:
            if name in group["param_names"]:
                if len(group["params"]) == 1:
                    group["lr"] = group["base_lr"] = lr
                    return
                i = group["param_names"].index(name)
                del group["param_names"][i]
                settings = {key: group[key] for key in group.keys() - {"param_names"}}
                own = {"params": [(name, group["params"].pop(i))], "lr": lr, "base_lr": lr}
                each.add_param_group(settings | own)
                return
    raise ValueError(f"no optimizer holds a parameter {name}")


def step(optimizers: list[torch.optim.Optimizer], scale: float) -> None:
    """Step at `scale` times the learning rates, and clear the gradients."""
    for each in optimizers:
        for group in each.param_groups:
            group["lr"] = group["base_lr"] * scale
        each.step()
        each.zero_grad()


def finish(optimizers: list[torch.optim.Optimizer]) -> None:
    """Switch schedule-free optimizers to the weights for evaluation, after the last step."""
    for each in optimizers:
        if hasattr(each, "eval"):
            each.eval()  # pyright: ignore[reportAttributeAccessIssue]
