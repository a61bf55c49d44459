"""Which layers activation preconditioning covers, and for every other weight, why not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..process_group import local, row_mesh_dim
from .capture import is_replaced

USUAL = (nn.Linear, nn.Conv2d, nn.Embedding)


@dataclass(frozen=True)
class Covered:
    """A layer that can be preconditioned: its weight acts on inputs of d_in features."""

    name: str  # of the module
    module: nn.Module
    d_in: int
    is_transposed: bool = False  # weight (d_in, d_out): Conv1D and Embedding
    is_diagonal: bool = False  # one-hot inputs

    @property
    def weight(self) -> nn.Parameter:
        """Looked up when needed: wrappers replace a module's Parameter objects."""
        return self.module.weight  # pyright: ignore

    @property
    def grad(self) -> Tensor | None:
        """The gradient, of which FSDP2 leaves every process some rows."""
        grad = self.weight.grad
        return None if grad is None else local(grad)

    def check_layout(self) -> None:
        """Raise ValueError unless every process can compute its part of M from its part of G."""
        try:
            is_spread = row_mesh_dim(self.weight) is not None
        except ValueError as error:
            raise ValueError(f"{self.name}.weight cannot be preconditioned: {error}") from None
        if is_spread and self.is_transposed and not self.is_diagonal:
            raise ValueError(
                f"{self.name}.weight is (d_in, d_out) and its rows are spread over processes: "
                "M = G P needs whole columns of it. Exclude it, or use DDP"
            )

    def as_matrix(self, weight_like: Tensor) -> Tensor:
        """The weight or its gradient as (d_out, d_in); a copy where strides allow no view."""
        return weight_like.mT if self.is_transposed else weight_like.flatten(1)

    def write(self, matrix: Tensor, weight_like: Tensor) -> None:
        """weight_like <- matrix (d_out, d_in): the reverse of `as_matrix`, in place."""
        weight_like.copy_(matrix.mT if self.is_transposed else matrix.view(weight_like.shape))


def find_layers(
    model: nn.Module,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    embeddings: bool = False,
) -> tuple[list[Covered], dict[str, str]]:
    """The covered layers, and for every weight of two or more dimensions that is not, why not.

    Args:
        include: module names to cover, with `*` and `?`; None: all that can be. What a wildcard
            matches but cannot be covered is left alone.
        exclude: module names to leave alone, likewise.
    Raises:
        TypeError: the model is not an nn.Module.
        ValueError: a pattern matches nothing, `include` gives the exact name of a layer that cannot
            be covered, a parameter is not initialised yet, or nothing is left to cover.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is {type(model).__name__}: must be a torch.nn.Module")
    weights = _weights(model)
    _check_patterns([name for name, *_ in weights], include=include, exclude=exclude)
    obstacles = _obstacles(model, weights, embeddings)
    covered, reasons = [], {}
    for name, module, key, _ in weights:
        weight, choice = f"{name}.{key}", _left_out(name, include, exclude)
        if weight in obstacles and not choice and name in (include or ()):
            raise ValueError(f"include covers {weight}, which cannot be: {obstacles[weight]}")
        reason = obstacles.get(weight, choice)
        if reason:
            reasons[weight] = reason
        else:
            covered.append(_describe(name, module))
    if not covered:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"no layer of this model can be preconditioned ({listed or 'no weights'})")
    return covered, reasons


Weight = tuple[str, nn.Module, str, nn.Parameter]  # its module's name, the module, its own name


def _weights(model: nn.Module) -> list[Weight]:
    """Every parameter of two or more dimensions."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"{name} has no shape yet (a lazy module); run one batch through the model first"
            )
    return [
        (name, module, key, parameter)
        for name, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2
    ]


def _obstacles(model: nn.Module, weights: list[Weight], embeddings: bool) -> dict[str, str]:
    """For every weight that cannot be covered, whatever is asked for: why not."""
    uses = Counter(weight for *_, weight in weights)
    attention = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    inside_attention = {child for m in attention for child in m.modules()}
    obstacles = {}
    for name, module, key, weight in weights:
        if key != "weight":
            reason = "not the weight of a linear layer"
        elif module in inside_attention:
            reason = "part of nn.MultiheadAttention, which does not call its layers"
        elif uses[weight] > 1:
            reason = "tied: shared with another layer"
        else:
            reason = _why_not(module, weight, embeddings)
        if reason:
            obstacles[f"{name}.{key}"] = reason
    return obstacles


def _left_out(name: str, include: Sequence[str] | None, exclude: Sequence[str] | None) -> str:
    """Which of the two patterns leaves this module out; empty if neither does."""
    if _matches(name, exclude):
        return "in exclude"
    return "" if include is None or _matches(name, include) else "not in include"


def is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's linear layer with a transposed weight, without importing transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def _why_not(module: nn.Module, weight: Tensor, embeddings: bool) -> str:
    """Why this layer cannot be covered; empty if it can."""
    if not weight.requires_grad:
        return "frozen"
    if is_replaced(module):
        return "its forward was replaced already (by another preconditioner?)"
    if is_conv1d(module):
        return ""
    if not any(type(module).forward is kind.forward for kind in USUAL):
        return f"{type(module).__name__} is not a linear layer with the usual forward"
    if isinstance(module, nn.Embedding):
        plain = not module.sparse and module.max_norm is None and not module.scale_grad_by_freq
        if not plain:
            return "an embedding with sparse gradients, max_norm or scale_grad_by_freq"
        return "" if embeddings else "an embedding (embeddings=False)"
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and module.padding_mode == "zeros"
        plain = plain and not isinstance(module.padding, str)
        return "" if plain else "a convolution with groups, or padding given by name or not zero"
    return ""


def _describe(name: str, module: nn.Module) -> Covered:
    if isinstance(module, nn.Embedding):
        d_in = module.num_embeddings
        return Covered(name, module, d_in, is_transposed=True, is_diagonal=True)
    weight: Tensor = module.weight  # pyright: ignore
    if is_conv1d(module):
        return Covered(name, module, weight.shape[0], is_transposed=True)
    return Covered(name, module, math.prod(weight.shape[1:]))


def _matches(name: str, patterns: Sequence[str] | None) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns or ())


def _check_patterns(names: list[str], **pattern_lists: Sequence[str] | None) -> None:
    for key, patterns in pattern_lists.items():
        if isinstance(patterns, str):
            raise ValueError(f"{key}={patterns!r}: must be a list of names; write [{patterns!r}]")
        if not all(isinstance(pattern, str) for pattern in patterns or ()):
            raise ValueError(f"{key}={patterns!r}: must be a list of names, each of them a str")
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"pattern {pattern!r} matches no module that has a weight matrix of its own; "
                    f"these have: {', '.join(names[:20])} ..."
                )
