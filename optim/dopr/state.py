"""Check a saved state of the preconditioner, and load it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..legacy_names import renamed_state
from ..process_group import Collective
from .layer import Layer, log
from .refresh import inverse_roots
from .settings import DoprSettings
from .statistics import InverseRoot
from .weights import without_wrappers

# Only states of inverse="newton_schulz" have it; if absent, the current basis is used.
OPTIONAL_KEYS = {"deflation_basis"}
# `gram` may be non-finite: the next refresh drops it.
FINITE_KEYS = ("sigma", "P", "damping", "deflation_basis", "mean", "mean_eigenvalue")


def load_state(
    state: Any, layers: Sequence[Layer], settings: DoprSettings, collective: Collective
) -> None:
    """Load a state; see `ActivationPreconditioner.load_state_dict`. Nothing changes on error."""
    state = renamed_state(state)
    if isinstance(state, dict) and all(isinstance(name, str) for name in state):
        names = {layer.name for layer in layers}
        state = {
            name if name in names else without_wrappers(name): each for name, each in state.items()
        }
    if problems := state_problems(state, layers):
        raise ValueError("preconditioner state does not fit: " + "; ".join(problems))
    recomputed = _outdated_inverse_roots(state, layers, settings, collective)
    for layer in layers:
        layer.load_state_dict(state[layer.name], with_sums=collective.rank == 0)
    for layer, new in recomputed:
        layer.set_inverse_root(new)


def _outdated_inverse_roots(
    state: dict[str, Any], layers: Sequence[Layer], settings: DoprSettings, collective: Collective
) -> list[tuple[Layer, InverseRoot]]:
    """Recompute every P of the state that was made with other settings, from the Σ of the state."""
    outdated = [
        layer
        for layer in layers
        if state[layer.name]["n_refreshes"]
        and {"fresh_mean": False} | state[layer.name]["made_with"] != settings.p_settings
    ]
    if outdated:
        log.info("recomputing P of %d layers, saved with other settings", len(outdated))
    return inverse_roots(
        outdated, lambda layer: layer.statistics_in(state[layer.name]), settings, collective
    )


def state_problems(state: Any, layers: Sequence[Layer]) -> list[str]:
    """List why the layers cannot load a state, {layer: {key: value}}."""
    if not isinstance(state, dict):
        return [f"it is a {type(state).__name__}, but must be a dict with an entry for every layer"]
    names = {layer.name for layer in layers}
    problems = [f"missing {name}" for name in sorted(names - state.keys())]
    problems += [f"unexpected {name}" for name in sorted(state.keys() - names, key=str)]
    for layer in layers:
        if layer.name in state:
            problems += _layer_problems(state[layer.name], layer)
    return problems


def _layer_problems(state: Any, layer: Layer) -> list[str]:
    """List why one layer cannot load its part of a state."""
    if not isinstance(state, dict):
        return [f"{layer.label} is a {type(state).__name__}, but must be a dict"]
    made_with = state.get("made_with")
    if isinstance(made_with, dict):
        saved_with = made_with.get("fresh_mean", False)
        if saved_with != layer.settings.fresh_mean:
            return [f"{layer.label} was saved with fresh_mean={saved_with}"]
    missing = {*layer.tensors(), *layer.NUMBERS, "made_with"} - state.keys() - OPTIONAL_KEYS
    if missing:
        return [f"{layer.label} has no {', '.join(sorted(missing))}"]
    problems = []
    for key, own in layer.tensors().items():
        value = state.get(key, own)
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        if shape is None:
            problems.append(f"{key} is a {type(value).__name__}, but must be a tensor")
        elif shape != tuple(own.shape):
            problems.append(f"{key} is {shape}, but must be {tuple(own.shape)}")
        elif key in FINITE_KEYS and not value.isfinite().all():
            problems.append(f"{key} is not finite")
    for key in layer.NUMBERS:
        if not isinstance(state[key], int) or state[key] < 0:
            problems.append(f"{key} is {state[key]!r}, but must be an integer >= 0")
    if not isinstance(state["made_with"], dict):
        problems.append(f"made_with is {state['made_with']!r}, but must be a dict")
    return [f"{layer.label}: {problem}" for problem in problems]
