"""Check the settings of the optimizer before anything is built.

A class of another package is tried out on three small parameters, in a tenth of a second.
"""

from typing import Any

from optim.build import has_aux, problems_of, third_party


def optimizer_problems(settings: dict[str, Any]) -> list[str]:
    """List why the optimizer that the settings name cannot be used with the other settings."""
    name, aux_lr = settings["optimizer"], settings["aux_lr"]
    try:
        third = third_party(name, settings["optimizer_args"], settings["optimizer_roles"])
    except ValueError as error:
        return [str(error)]
    problems = []
    if aux_lr is not None and not has_aux(name, third):
        problems.append(
            f"aux_lr={aux_lr}: optimizer={name} has no auxiliary AdamW, only optimizers of "
            "matrices such as muon have one; remove it or add --aux_lr=none, and check lr"
        )
    if third:
        is_sharded = settings["parallel"] in ("fsdp", "hsdp")
        asked = {"is_sharded": is_sharded, "is_wider": settings["mup"]}
        problems += problems_of(third, **asked, weight_decay=settings["weight_decay"])
    return problems
