"""Translate the names of earlier releases in settings and in the preconditioner's state.

This is the only table of old names. The next release drops it.
"""

from __future__ import annotations

import warnings
from typing import Any

SETTINGS = {"kernel": "backend", "muon_scale": "adjust_lr", "coefficients": "ns_coefficients"}
VALUES = {  # (new name, old value): new value
    ("adjust_lr", "match_rms"): "match_rms_adamw",
    ("adjust_lr", "spectral"): "unit_rms_norm",
}
STATE = {"n_mended": "n_fallbacks", "directions": "deflation_basis"}
GROUP = {"blocks": "qkv_blocks", "scale": "adjust_lr", "coefficients": "ns_coefficients"}
REMOVED = {  # setting: what to do instead
    "deterministic": "remove it",
    "ns_steps": "remove it; optim.Muon and optim.AdaMuon still take it",
}


def renamed_settings(settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings with new names and values, and the old names and values found.

    Raises:
        ValueError: if a setting is given under its old and its new name.
    """
    renamed, old = {}, []
    for key, value in settings.items():
        new_key = SETTINGS.get(key, key)
        if new_key != key and new_key in settings:
            raise ValueError(f"{key} is the old name of {new_key}: set only {new_key}")
        new_value = _renamed_value(new_key, value)
        if new_key != key:
            old.append(key)
        if new_value != value:
            old.append(f"{new_key}={value}")
        renamed[new_key] = new_value
    return renamed, old


def renamed_group(group: dict[str, Any]) -> dict[str, Any]:
    """Return settings of Muon or AdaMuon with new keys and values; warn if they have old ones."""
    renamed, old = {}, []
    for key, value in group.items():
        new_key = GROUP.get(key, key)
        renamed[new_key] = _renamed_value(new_key, value)
        if new_key != key:
            old.append(f"{key} -> {new_key}")
        if renamed[new_key] is not value:
            old.append(f"{value} -> {renamed[new_key]}")
    if not old:
        return group
    names = ", ".join(sorted(old))
    warnings.warn(f"a param group has names of an earlier release ({names})", FutureWarning, 3)
    return renamed


def _renamed_value(key: str, value: Any) -> Any:
    """Return the new name of a value of the setting that is now called `key`."""
    return VALUES.get((key, value), value) if isinstance(value, str) else value


def renamed_state(state: Any) -> Any:
    """Return a preconditioner state, {layer: {key: value}}, with new keys.

    Warns once if an old key was found. Leaves anything that is not a dict of dicts as it is.
    """
    if not isinstance(state, dict):
        return state
    layers = [layer for layer in state.values() if isinstance(layer, dict)]
    old = sorted(STATE.keys() & {key for layer in layers for key in layer})
    if not old:
        return state
    pairs = ", ".join(f"{key} -> {STATE[key]}" for key in old)
    warnings.warn(
        f"the preconditioner state has keys of an earlier release ({pairs}): save it again to "
        "rename them",
        FutureWarning,
        stacklevel=4,  # the caller of load_state_dict
    )
    return {
        name: {STATE.get(key, key): value for key, value in layer.items()}
        if isinstance(layer, dict)
        else layer
        for name, layer in state.items()
    }
