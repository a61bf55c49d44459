"""Find the layers that can be preconditioned, and the reason for every weight that cannot."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..process_group import column_mesh_dim, local, row_mesh_dim
from .forwards import TAKEN, why_replaced
from .weights import Weight, weights_of

COVERED_TYPES = (nn.Linear, nn.Conv2d, nn.Embedding)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class CoveredLayer:
    """Describe a layer that can be preconditioned. Its weight acts on inputs of d_in features."""

    name: str  # name of the module, without the parts that wrappers add
    module: nn.Module
    d_in: int
    is_transposed: bool = False  # the weight is (d_in, d_out): Conv1D and Embedding
    is_diagonal: bool = False  # the inputs are one-hot, so Σ is diagonal
    padding_idx: int | None = None  # the token whose row of G an embedding leaves zero

    @property
    def full_name(self) -> str:
        """The name of the weight."""
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def weight(self) -> nn.Parameter:
        """The weight. It is read from the module, because wrappers replace Parameter objects."""
        return self.module.weight  # pyright: ignore

    @property
    def grad(self) -> Tensor | None:
        """The local part of the gradient: all of it, or some rows or columns of the weight."""
        grad = self.weight.grad
        return None if grad is None else local(grad)

    def column_mesh_dim(self) -> int | None:
        """Return the mesh dimension over which the columns of G (d_out, d_in) are sharded, or None.

        Raises:
            ValueError: if the weight is sharded in a way that is not supported.
        """
        weight: Any = self.weight
        try:
            if self.is_transposed or weight.dim() > 2:
                rows = row_mesh_dim(weight)  # nothing else may be sharded
                dim = rows if self.is_transposed and not self.is_diagonal else None
            else:
                dim = column_mesh_dim(weight)
        except ValueError as error:
            raise ValueError(f"{self.full_name} cannot be preconditioned: {error}") from None
        return None if dim is None or weight.device_mesh.size(dim) == 1 else dim

    def as_matrix(self, weight_like: Tensor) -> Tensor:
        """Return the weight or its gradient as (d_out, d_in), as a view if the strides allow."""
        return weight_like.mT if self.is_transposed else weight_like.flatten(1)

    def write(self, M: Tensor, grad: Tensor) -> None:
        """Copy M (d_out, d_in) into `grad` in place, the reverse of `as_matrix`."""
        grad.copy_(M.mT if self.is_transposed else M.view(grad.shape))


class Selection(NamedTuple):
    """Which weights to cover, as the arguments of ActivationPreconditioner say."""

    include: Sequence[str] | None
    exclude: Sequence[str] | None
    embeddings: bool

    def skips(self, weight: Weight) -> str:
        """Return which of the two lists skips this weight, or an empty string."""
        if weight.matches(self.exclude):
            return "in exclude"
        return "" if self.include is None or weight.matches(self.include) else "not in include"


def find_layers(
    model: nn.Module, selection: Selection
) -> tuple[list[CoveredLayer], dict[str, str]]:
    """Return the layers to precondition, and {weight name: reason} for all other weights.

    Only weights of two or more dimensions are considered.

    Raises:
        TypeError: if the model is not an nn.Module.
        ValueError: if the model is a wrapper that cannot be used (FSDP1, nn.DataParallel), a
            pattern matches nothing, `include` names a layer exactly that cannot be covered, a
            parameter is not initialised yet, or no layer is left to cover.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, but must be a torch.nn.Module")
    _check_wrappers(model)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"{name} has no shape yet (lazy module): run one batch through the model first"
            )
    weights = weights_of(model)
    _check_patterns(weights, include=selection.include, exclude=selection.exclude)
    covered, reasons = survey(model, selection)
    for weight in weights:
        reason = reasons.get(weight.full_name)
        if not reason or selection.skips(weight):
            continue
        if {weight.name, weight.full_name, weight.path} & {*(selection.include or ())}:
            raise ValueError(
                f"include names {weight.full_name}, which cannot be preconditioned: {reason}"
            )
        if reason == TAKEN:  # training without these layers is never meant
            raise ValueError(f"{weight.full_name} cannot be preconditioned: {reason}")
    if not covered:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"no layer of this model can be preconditioned ({listed or 'no weights'})")
    return covered, reasons


def survey(
    model: nn.Module, selection: Selection, own: Container[nn.Module] = ()
) -> tuple[list[CoveredLayer], dict[str, str]]:
    """Return what `find_layers` returns, but check nothing.

    Args:
        own: modules whose forward the caller has replaced.
    """
    weights = weights_of(model)
    uses = Counter(weight.parameter for weight in weights)
    attention = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    inside_attention = {child for m in attention for child in m.modules()}
    covered, reasons = [], {}
    for weight in weights:
        if weight.key != "weight":
            reason = "not the weight of a linear layer"
        elif weight.module in inside_attention:
            reason = "part of nn.MultiheadAttention, which does not call its layers"
        elif uses[weight.parameter] > 1:
            reason = "tied: shared with another layer"
        else:
            reason = _why_not(weight, selection.embeddings, own)
        if reason := reason or selection.skips(weight):
            reasons[weight.full_name] = reason
        else:
            covered.append(_describe(weight))
    return covered, reasons


def is_conv1d(module: nn.Module) -> bool:
    """Return whether this is Hugging Face's Conv1D, without importing transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def _why_not(weight: Weight, embeddings: bool, own: Container[nn.Module]) -> str:
    """Return why this layer cannot be covered, or an empty string if it can."""
    module = weight.module
    if not weight.parameter.requires_grad:
        return "frozen"
    if weight.parameter.dtype not in DTYPES:
        return (
            f"its dtype is {weight.parameter.dtype}: keep weights in float32 or bfloat16, and use "
            "torch.autocast for lower precision"
        )
    if module not in own and (reason := why_replaced(module)):
        return reason
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


def _describe(weight: Weight) -> CoveredLayer:
    """Describe a module that can be covered."""
    name, module, shape = weight.name, weight.module, weight.parameter.shape
    if isinstance(module, nn.Embedding):
        d_in, padding = module.num_embeddings, module.padding_idx
        return CoveredLayer(
            name, module, d_in, is_transposed=True, is_diagonal=True, padding_idx=padding
        )
    if is_conv1d(module):
        return CoveredLayer(name, module, shape[0], is_transposed=True)
    return CoveredLayer(name, module, math.prod(shape[1:]))


def _check_wrappers(model: nn.Module) -> None:
    """Raise ValueError if the model holds a wrapper that hides its weights or copies its layers."""
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "the model is wrapped in FullyShardedDataParallel (FSDP1), which flattens weights: "
                "use FSDP2 (torch.distributed.fsdp.fully_shard) and construct the preconditioner "
                "after it"
            )
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise ValueError(
                "nn.DataParallel runs copies of the layers, whose activations are not seen: use "
                "DistributedDataParallel"
            )


def _check_patterns(weights: list[Weight], **pattern_lists: Sequence[str] | None) -> None:
    """Raise ValueError unless every argument is a list of patterns that each match a weight."""
    for key, patterns in pattern_lists.items():
        if isinstance(patterns, str):
            raise ValueError(f"{key}={patterns!r}: must be a list of names; write [{patterns!r}]")
        if not all(isinstance(pattern, str) for pattern in patterns or ()):
            raise ValueError(f"{key}={patterns!r}: must be a list of strings, the names of modules")
        for pattern in patterns or ():
            if not any(weight.matches([pattern]) for weight in weights):
                names = [*dict.fromkeys(weight.name for weight in weights)]
                more = " ..." if len(names) > 20 else ""
                raise ValueError(
                    f"{key}: pattern {pattern!r} matches no module that owns a weight matrix; "
                    f"the modules that own one are {', '.join(names[:20])}{more}"
                )
