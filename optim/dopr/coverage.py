"""Find the layers that can be preconditioned, and the reason for every weight that cannot."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..process_group import local, row_mesh_dim
from .capture import is_replaced

COVERED_TYPES = (nn.Linear, nn.Conv2d, nn.Embedding)


@dataclass(frozen=True)
class CoveredLayer:
    """Describe a layer that can be preconditioned. Its weight acts on inputs of d_in features."""

    name: str  # name of the module
    module: nn.Module
    d_in: int
    is_transposed: bool = False  # the weight is (d_in, d_out): Conv1D and Embedding
    is_diagonal: bool = False  # the inputs are one-hot, so Σ is diagonal

    @property
    def weight(self) -> nn.Parameter:
        """The weight. It is read from the module, because wrappers replace Parameter objects."""
        return self.module.weight  # pyright: ignore

    @property
    def grad(self) -> Tensor | None:
        """The local part of the gradient: all of it, or some rows under FSDP2."""
        grad = self.weight.grad
        return None if grad is None else local(grad)

    def check_layout(self) -> None:
        """Raise ValueError unless each process can compute its rows of M from its rows of G."""
        try:
            is_row_sharded = row_mesh_dim(self.weight) is not None
        except ValueError as error:
            raise ValueError(f"{self.name}.weight cannot be preconditioned: {error}") from None
        if is_row_sharded and self.is_transposed and not self.is_diagonal:
            raise ValueError(
                f"{self.name}.weight is (d_in, d_out) and its rows are sharded over processes, but "
                "M = G P needs whole columns: exclude this layer, or use DDP"
            )

    def as_matrix(self, weight_like: Tensor) -> Tensor:
        """Return the weight or its gradient as (d_out, d_in), as a view if the strides allow."""
        return weight_like.mT if self.is_transposed else weight_like.flatten(1)

    def write(self, M: Tensor, grad: Tensor) -> None:
        """Copy M (d_out, d_in) into `grad` in place, the reverse of `as_matrix`."""
        grad.copy_(M.mT if self.is_transposed else M.view(grad.shape))


def find_layers(
    model: nn.Module,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    embeddings: bool = False,
) -> tuple[list[CoveredLayer], dict[str, str]]:
    """Return the layers to precondition, and {weight name: reason} for all other weights.

    Only weights of two or more dimensions are considered.

    Args:
        include: names of the modules to cover; `*` and `?` are wildcards. Defaults to all modules
            that can be covered. A wildcard skips the modules that cannot be covered.
        exclude: names of the modules to skip, with the same wildcards.
        embeddings: whether to cover nn.Embedding.
    Raises:
        TypeError: if the model is not an nn.Module.
        ValueError: if a pattern matches nothing, `include` names a layer exactly that cannot be
            covered, a parameter is not initialised yet, or no layer is left to cover.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, but must be a torch.nn.Module")
    weights = _weights(model)
    _check_patterns([name for name, *_ in weights], include=include, exclude=exclude)
    obstacles = _obstacles(model, weights, embeddings)
    covered, reasons = [], {}
    for name, module, key, _ in weights:
        weight, skipped = f"{name}.{key}", _skipped_by_pattern(name, include, exclude)
        if weight in obstacles and not skipped and name in (include or ()):
            raise ValueError(
                f"include names {weight}, which cannot be preconditioned: {obstacles[weight]}"
            )
        reason = obstacles.get(weight, skipped)
        if reason:
            reasons[weight] = reason
        else:
            covered.append(_describe(name, module))
    if not covered:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"no layer of this model can be preconditioned ({listed or 'no weights'})")
    return covered, reasons


Weight = tuple[str, nn.Module, str, nn.Parameter]  # module name, module, parameter name, parameter


def _weights(model: nn.Module) -> list[Weight]:
    """List the parameters of two or more dimensions."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"{name} has no shape yet (lazy module): run one batch through the model first"
            )
    return [
        (name, module, key, parameter)
        for name, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2
    ]


def _obstacles(model: nn.Module, weights: list[Weight], embeddings: bool) -> dict[str, str]:
    """Return {weight name: reason} for the weights that these settings cannot cover."""
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


def _skipped_by_pattern(
    name: str, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> str:
    """Return which of the two arguments skips this module, or an empty string."""
    if _matches(name, exclude):
        return "in exclude"
    return "" if include is None or _matches(name, include) else "not in include"


def is_conv1d(module: nn.Module) -> bool:
    """Return whether this is Hugging Face's Conv1D, without importing transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def _why_not(module: nn.Module, weight: Tensor, embeddings: bool) -> str:
    """Return why this layer cannot be covered, or an empty string if it can."""
    if not weight.requires_grad:
        return "frozen"
    if is_replaced(module):
        return "its forward was replaced already (by another preconditioner?)"
    if is_conv1d(module):
        return ""
    if not any(type(module).forward is kind.forward for kind in COVERED_TYPES):
        return f"{type(module).__name__} is not a linear layer with the usual forward"
    if isinstance(module, nn.Embedding):
        plain = not module.sparse and module.max_norm is None and not module.scale_grad_by_freq
        if not plain:
            return "an embedding with sparse gradients, max_norm or scale_grad_by_freq"
        return "" if embeddings else "an embedding (embeddings=False)"
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and module.padding_mode == "zeros"
        plain = plain and not isinstance(module.padding, str)
        if not plain:
            return (
                "a convolution with groups, padding='same'/'valid' or a padding_mode other than "
                "'zeros'"
            )
    return ""


def _describe(name: str, module: nn.Module) -> CoveredLayer:
    """Describe a module that can be covered."""
    if isinstance(module, nn.Embedding):
        d_in = module.num_embeddings
        return CoveredLayer(name, module, d_in, is_transposed=True, is_diagonal=True)
    weight: Tensor = module.weight  # pyright: ignore
    if is_conv1d(module):
        return CoveredLayer(name, module, weight.shape[0], is_transposed=True)
    return CoveredLayer(name, module, math.prod(weight.shape[1:]))


def _matches(name: str, patterns: Sequence[str] | None) -> bool:
    """Return whether a name matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns or ())


def _check_patterns(names: list[str], **pattern_lists: Sequence[str] | None) -> None:
    """Raise ValueError unless every argument is a list of patterns that each match a name."""
    for key, patterns in pattern_lists.items():
        if isinstance(patterns, str):
            raise ValueError(f"{key}={patterns!r}: must be a list of names; write [{patterns!r}]")
        if not all(isinstance(pattern, str) for pattern in patterns or ()):
            raise ValueError(f"{key}={patterns!r}: must be a list of strings, the names of modules")
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in names):
                more = " ..." if len(names) > 20 else ""
                raise ValueError(
                    f"{key}: pattern {pattern!r} matches no module that owns a weight matrix; "
                    f"the modules that own one are {', '.join(names[:20])}{more}"
                )


def uncovered_rows(
    reasons: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> list[dict[str, Any]]:
    """Return a row like that of `Layer.report`, with the reason, for each weight not covered."""
    blank = {"covered": False, "bytes": 0, "condition": None, "norm_ratio": None, "fallbacks": 0}
    return [
        {"name": name, "shape": shapes.get(name), "reason": reason, **blank}
        for name, reason in reasons.items()
    ]
