"""What is saved of all processes, and what is wrong with a saved state, before it is taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from optim.collective import Collective
from optim.reduction import Sums
from optim.refresh import preconditioners
from optim.statistics import Layer, Preconditioner, Settings, log

OPTIONAL = {"directions"}  # a state of another `inverse` has none, and they are found again
# A running sum may be spoilt: it is dropped at the refresh.
FINITE = ("sigma", "P", "damping", "directions")


def state_of(layers: list[Layer], collective: Collective) -> dict[str, Any]:
    """{layer: {key: value}} with the running sums of all processes, in every process."""
    state = {layer.name: layer.state_dict() for layer in layers}
    if collective.size > 1:
        sums = Sums(layers, collective)
        sums.start(layers)
        for layer in layers:
            state[layer.name] |= {"gram": sums.gram(layer), "count": sums.count(layer)}
    return state


def renewed(
    state: dict[str, Any], layers: list[Layer], settings: Settings, collective: Collective
) -> list[tuple[Layer, Preconditioner]]:
    """The layers whose P in `state` was made with other settings, with the P of ours."""
    outdated = [
        layer
        for layer in layers
        if state[layer.name]["n_refreshes"] and state[layer.name]["made_with"] != settings.of_P
    ]
    if outdated:
        log.info("%d P were made with other settings and are made again", len(outdated))
    return preconditioners(
        outdated, lambda layer: layer.statistics_in(state[layer.name]), settings, collective
    )


def state_problems(state: Any, layers: Sequence[Layer]) -> list[str]:
    """Why the layers cannot take this state, {layer: {key: value}}; empty if they can."""
    if not isinstance(state, dict):
        return [f"it is {type(state).__name__}, wanted a dict with an entry for every layer"]
    names = {layer.name for layer in layers}
    problems = [f"missing {name}" for name in sorted(names - state.keys())]
    problems += [f"unexpected {name}" for name in sorted(state.keys() - names, key=str)]
    for layer in layers:
        problems += layer_problems(state[layer.name], layer) if layer.name in state else []
    return problems


def layer_problems(state: Any, layer: Layer) -> list[str]:
    """Why one layer cannot take this state."""
    name = layer.label
    if not isinstance(state, dict):
        return [f"{name} is {type(state).__name__}, wanted a dict"]
    missing = {*layer.tensors(), *layer.NUMBERS, "made_with"} - state.keys() - OPTIONAL
    if missing:
        return [f"{name} has no {', '.join(sorted(missing))}"]
    wrong = [
        f"{name}: {_tensor_problem(key, state[key], own)}"
        for key, own in layer.tensors().items()
        if key in state and _tensor_problem(key, state[key], own)
    ]
    wrong += [
        f"{name}: {key} is {state[key]!r}, wanted a whole number, at least 0"
        for key in layer.NUMBERS
        if not isinstance(state[key], int) or state[key] < 0
    ]
    if not isinstance(state["made_with"], dict):
        wrong.append(f"{name}: made_with is {state['made_with']!r}, wanted a dict")
    return wrong


def _tensor_problem(key: str, value: Any, own: Tensor) -> str:
    """What is wrong with one tensor of a state; empty if nothing is."""
    shape = tuple(value.shape) if isinstance(value, Tensor) else None
    if shape != tuple(own.shape):
        return f"{key} is {shape}, wanted {tuple(own.shape)}"
    return f"{key} is not finite" if key in FINITE and not value.isfinite().all() else ""
