"""Keep what the steps of an optimizer change in its param groups, such as a count of steps.

All other values of a param group follow from the settings of the run, and are not saved.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

NOT_SAVED = ("params", "lr")  # the schedule sets lr

Groups = list[dict[str, Any]]  # one dict for every param group of an optimizer


def values_of(optimizer: Optimizer) -> Groups:
    """Return copies of the values of the param groups, to compare with later."""
    return [
        {key: copy.deepcopy(value) for key, value in group.items() if key not in NOT_SAVED}
        for group in optimizer.param_groups
    ]


def changes_since(before: Groups, optimizer: Optimizer) -> Groups:
    """Return the values of the param groups that are new or have changed."""
    return [
        {key: value for key, value in group.items() if key not in old or _differ(old[key], value)}
        for old, group in zip(before, values_of(optimizer), strict=True)
    ]


def group_problem(saved: Groups, optimizer: Optimizer) -> str:
    """Return why the param groups of an optimizer cannot take the saved values, or ""."""
    if len(saved) != len(optimizer.param_groups):
        return f"there are {len(saved)} param groups, but must be {len(optimizer.param_groups)}"
    for values in saved:
        for key, value in values.items():
            is_number = isinstance(value, (float, Tensor))
            if key in NOT_SAVED or (is_number and not torch.as_tensor(value).isfinite().all()):
                return f"{key}={value} of a param group cannot be used"
    return ""


def _differ(old: Any, new: Any) -> bool:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return not torch.equal(old, new)
    return type(old) is not type(new) or old != new
