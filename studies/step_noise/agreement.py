"""Measure how much of a step all batches have in common, by the covariance that preconditions it.

At fixed weights, each batch has a gradient G of a layer and a covariance Σ of the layer's inputs.
The agreement of the steps M = m G (Σ + γ m I)⁻¹, m = tr Σ / d, of two batches is

    agreement = E⟨M, M'⟩ / E⟨M, M⟩

for four choices of Σ: none (M = G), the mean over all batches, that of another batch, and that of
the batch whose gradient is G. It is 1 if the steps do not depend on the batches, and 0 if they have
nothing in common. Everything is computed in float64.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from eval.tables import markdown

N_BATCHES = 64
COLUMNS = ("G alone", "mean Σ", "Σ of another batch", "Σ of the batch itself")

Statistics = dict[str, tuple[Tensor, Tensor]]  # {layer: (G (m, d), Σ (d, d))}


def statistics(model: nn.Module, names: Iterable[str], loss_of: Callable[[], Tensor]) -> Statistics:
    """Return G and Σ of the named linear layers on the batch whose loss `loss_of` computes.

    Raises ValueError if a layer is used more than once.
    """
    layers = {name: model.get_submodule(name) for name in names}
    inputs: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, layer_inputs: tuple[Tensor, ...]) -> None:
        if name in inputs:
            raise ValueError(f"layer {name} is used more than once")
        inputs[name] = layer_inputs[0].detach().flatten(0, -2)

    hooks = [layer.register_forward_pre_hook(partial(keep, name)) for name, layer in layers.items()]
    try:
        weights = [model.get_parameter(f"{name}.weight") for name in layers]
        gradients = torch.autograd.grad(loss_of(), weights)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: (G, inputs[name].mT @ inputs[name] / len(inputs[name]))
        for name, G in zip(layers, gradients, strict=True)
    }


def preconditioned(G: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """Return m G (Σ + γ m I)⁻¹ of every batch: (b, m, d) and (b or 1, d, d) -> (b, m, d)."""
    m = sigma.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    damped = sigma + gamma * m * torch.eye(sigma.shape[-1], dtype=sigma.dtype)
    return m * torch.linalg.solve(damped, G, left=False)


def agreement(M: Tensor) -> float:
    """Return E⟨M, M'⟩ / E⟨M, M⟩ over all pairs of the steps M (b, m, d) of b batches."""
    b, squares = len(M), M.square().sum()
    return float((M.sum(0).square().sum() - squares) / ((b - 1) * squares))


def agreements(G: Tensor, sigma: Tensor, gamma: float) -> tuple[float, ...]:
    """Return the agreements of COLUMNS from G (b, m, d) and Σ (b, d, d) of b batches."""
    behind = sigma.mean(0, keepdim=True), sigma.roll(1, 0), sigma
    return tuple(map(agreement, (G, *(preconditioned(G, each, gamma) for each in behind))))


def of_layers(batches: list[Statistics], gamma: float) -> dict[str, tuple[float, ...]]:
    """Return {layer: its agreements}."""
    found = {}
    for name in batches[0]:
        G, sigma = (torch.stack(each) for each in zip(*(b[name] for b in batches), strict=True))
        found[name] = agreements(G, sigma, gamma)
    return found


def table(found: dict[str, tuple[float, ...]]) -> str:
    """Return a table with the agreements of every layer."""
    cells = [(f"`{name}`", *(f"{each:.3f}" for each in values)) for name, values in found.items()]
    return markdown(("layer", *COLUMNS), cells)
