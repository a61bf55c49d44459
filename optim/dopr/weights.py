"""List the weights of a model, under names that do not depend on the wrappers around it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import UninitializedParameter

# Parts of a module's name that torch.compile and activation checkpointing add.
INNER_WRAPPERS = re.compile(r"\b(?:_orig_mod|_checkpoint_wrapped_module)\.")

# Prefixes that DDP, AveragedModel, torch.compile and PEFT add to all names.
OUTER_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|base_model\.model)\.)+")


class Weight(NamedTuple):
    """A parameter of two or more dimensions, and where it is in the model."""

    name: str  # of the module, without the parts that wrappers add
    path: str  # of the module, with them
    module: nn.Module
    key: str  # name of the parameter in the module
    parameter: nn.Parameter

    @property
    def full_name(self) -> str:
        """The name of the parameter."""
        return f"{self.name}.{self.key}" if self.name else self.key

    def matches(self, patterns: Sequence[str] | None) -> bool:
        """Return whether a pattern matches the name of the module or of the parameter."""
        names = (self.name, self.path, self.full_name, f"{self.path}.{self.key}")
        return any(fnmatchcase(name, pattern) for pattern in patterns or () for name in names)


def weights_of(model: nn.Module) -> list[Weight]:
    """List the parameters of two or more dimensions. Skips those without a shape (lazy modules)."""
    outer = _outer_wrappers(model)
    return [
        Weight(without_inner_wrappers(f"{path}.".removeprefix(outer)[:-1]), path, module, key, w)
        for path, module in model.named_modules()
        for key, w in module.named_parameters(recurse=False)
        if not isinstance(w, UninitializedParameter) and w.dim() >= 2
    ]


def without_wrappers(name: str) -> str:
    """Return the name of a module without the parts that any wrapper may have added."""
    return without_inner_wrappers(OUTER_WRAPPERS.sub("", f"{name}.")[:-1])


def without_inner_wrappers(name: str) -> str:
    """Return the name of a module without the parts that torch.compile and checkpointing add."""
    return INNER_WRAPPERS.sub("", f"{name}.")[:-1]


def _outer_wrappers(model: nn.Module) -> str:
    """Return the prefix of all names that wrappers around the whole model add.

    It is "module." for DDP and AveragedModel, and "base_model.model." for PEFT.
    """
    prefix = ""
    while len(children := dict(model.named_children())) == 1 and not model._parameters:
        ((name, child),) = children.items()
        is_peft = type(model).__module__.startswith("peft.") and name in ("base_model", "model")
        if name not in ("module", "_orig_mod") and not is_peft:
            break
        prefix, model = f"{prefix}{name}.", child
    return prefix
