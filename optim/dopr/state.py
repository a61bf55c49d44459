"""Check a saved state of the preconditioner, and load it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..legacy_names import renamed_state
from ..process_group import Collective
from .distributed import Sums
from .layer import Layer, log
from .ownership import Processes
from .refresh import inverse_roots
from .settings import DoprSettings
from .statistics import InverseRoot
from .weights import without_wrappers

Gather = Literal["all", "first", "none"]
# Only states of inverse="newton_schulz" have it; if absent, the current basis is used.
OPTIONAL_KEYS = {"deflation_basis"}
# `gram` may be non-finite: the next refresh drops it.
FINITE_KEYS = ("sigma", "P", "damping", "deflation_basis", "mean", "mean_eigenvalue")


def gathered_state(layers: list[Layer], processes: Processes, gather: Gather) -> dict[str, Any]:
    """Return {layer: {key: value}}; see `ActivationPreconditioner.state_dict`."""
    everybody = processes.everybody
    if gather not in get_args(Gather):
        raise ValueError(f"gather={gather!r}: must be one of {', '.join(get_args(Gather))}")
    if everybody.size == 1:
        return {layer.name: layer.state_dict() for layer in layers}
    for layer in layers:
        layer.capture.finish()
    sums = Sums(layers, processes)
    sums.start(layers)
    state = {}
    for layer in layers:
        own = layer.state_dict() | {"count": sums.count(layer)}
        if sums.is_summed(layer):
            own["gram"] = sums.gram(layer)
        if layer.has_mean:
            everybody.sum_(own["column_sums"])  # a copy
        if layer.owner is not None:
            own |= _spread(layer, own, processes, gather)
        state[layer.name] = own
    return state


def _spread(
    layer: Layer, state: dict[str, Any], processes: Processes, gather: Gather
) -> dict[str, Tensor]:
    """Return the tensors that only the layer's owner holds, where `gather` wants them."""
    found = {}
    for key in layer.HELD:
        if key not in state:
            continue
        whole = layer.whole(key)
        if gather == "none":
            found[key] = state[key] if layer.is_held else whole
            continue
        held = state[key] if layer.is_held else torch.empty_like(whole, device=layer.P.device)
        assert layer.owner is not None
        Collective.wait([processes.shards.start_broadcast_(held, layer.owner)])
        is_wanted = gather == "all" or processes.everybody.rank == 0
        found[key] = held.to("cpu", copy=True) if is_wanted else whole
    return found


def load_state(
    state: Any, layers: Sequence[Layer], settings: DoprSettings, processes: Processes
) -> None:
    """Load a state; see `ActivationPreconditioner.load_state_dict`. Nothing changes on error."""
    state = renamed_state(state)
    if isinstance(state, dict) and all(isinstance(name, str) for name in state):
        names = {layer.name for layer in layers}
        state = {
            name if name in names else without_wrappers(name): each for name, each in state.items()
        }
    problems = state_problems(state, layers)
    if any(layer.owner is not None for layer in layers):  # the processes read different tensors
        n_problems = processes.everybody.sum_(layers[0].capture.count.new_tensor(len(problems)))
        if n_problems and not problems:
            problems = ["another process found what is wrong"]
    if problems:
        raise ValueError("preconditioner state does not fit: " + "; ".join(problems))
    recomputed = _outdated_inverse_roots(state, layers, settings, processes)
    is_first = processes.everybody.rank == 0
    for layer in layers:
        is_first_holder = layer.is_held and processes.replicas.rank == 0
        layer.load_state_dict(
            state[layer.name],
            with_tokens=is_first,
            with_gram=is_first if layer.owner is None else is_first_holder,
        )
    for layer, new in recomputed:
        layer.set_inverse_root(new)


def _outdated_inverse_roots(
    state: dict[str, Any], layers: Sequence[Layer], settings: DoprSettings, processes: Processes
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
        outdated, lambda layer: layer.statistics_in(state[layer.name]), settings, processes
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
    needed = {key for key in layer.tensors() if layer.needs(key)} - OPTIONAL_KEYS
    if missing := {*needed, *layer.NUMBERS, "made_with"} - state.keys():
        return [f"{layer.label} has no {', '.join(sorted(missing))}"]
    problems = []
    for key, own in layer.tensors().items():
        value, wanted = state.get(key, own), tuple(layer.whole(key).shape)
        if not layer.needs(key):  # another process reads it
            continue
        if not isinstance(value, Tensor) or value.is_meta:
            kind = "tensor without values" if isinstance(value, Tensor) else type(value).__name__
            problems.append(f"{key} is a {kind}, but must be a tensor")
        elif value.layout != torch.strided or value.is_complex():
            problems.append(f"{key} is sparse or complex, but must be a dense real tensor")
        elif tuple(value.shape) != wanted:
            problems.append(f"{key} is {tuple(value.shape)}, but must be {wanted}")
        elif key in FINITE_KEYS and not value.isfinite().all():
            problems.append(f"{key} is not finite")
        elif key == "count" and not (value >= 0 and value == value.long()):
            problems.append(f"count is {value.item()}, but must be an integer >= 0")
    for key in layer.NUMBERS:
        if not isinstance(state[key], int) or state[key] < 0:
            problems.append(f"{key} is {state[key]!r}, but must be an integer >= 0")
    if not isinstance(state["made_with"], dict):
        problems.append(f"made_with is {state['made_with']!r}, but must be a dict")
    return [f"{layer.label}: {problem}" for problem in problems]
