"""Replace the forward of a module instance by one that captures, and put it back.

Copies of the module do not capture.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..process_group import is_sharded
from .autograd import CapturedLinear, Tap
from .capture import Capture
from .tensor_parallel import tensor_parallel_linear

TAKEN = "another preconditioner is on it: call its detach() first"


def install(module: nn.Module, capture: Capture) -> None:
    """Replace `forward` on this module instance by one that captures. Undo it with `remove`."""
    vars(module)["_dopr_capture"] = capture  # neither a tensor nor a submodule
    module.forward = MethodType(_capturing_forward(module), module)


def reinstall(module: nn.Module, capture: Capture) -> None:
    """Undo `remove`, unless others replaced the forward."""
    if vars(module).get("_dopr_capture") is not capture and not why_replaced(module):
        install(module, capture)


def remove(module: nn.Module, capture: Capture) -> None:
    """Restore the `forward` of the module's class. Keep one that others put around ours."""
    if vars(module).get("_dopr_capture") is not capture:
        return  # removed already
    if getattr(vars(module).get("forward"), "__func__", None) in _FORWARDS:
        del module.forward, module._dopr_capture
    else:
        vars(module)["_dopr_capture"] = None  # the forward inside theirs captures no more


def is_captured(module: nn.Module, capture: Capture) -> bool:
    """Return whether the module still has the forward that `install` gave it for this capture."""
    return vars(module).get("_dopr_capture") is capture and "forward" in vars(module)


def why_replaced(module: nn.Module) -> str:
    """Say who replaced `forward` on this instance, and what to do; empty if nobody did.

    A copy of a capturing module inherits the replaced `forward` but has no capture, so it does not
    count as replaced.
    """
    if "forward" not in vars(module):
        return ""
    if "_dopr_capture" in vars(module):
        if module._dopr_capture is not None:
            return TAKEN
        inside = getattr(module.forward, "__func__", None)
        if inside in (*_FORWARDS, type(module).forward):  # the second, if the copy was pickled
            return ""
    if hasattr(module, "_hf_hook"):
        return (
            "hooks of accelerate replaced its forward: call "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
        )
    return "its forward was replaced on the instance: construct the preconditioner before that"


def _capturing_forward(module: nn.Module) -> Callable[..., Tensor]:
    if isinstance(module, nn.Embedding):
        return _embedding_forward
    if isinstance(module, nn.Conv2d):
        return _conv2d_forward
    return _linear_forward if isinstance(module, nn.Linear) else _conv1d_forward


def _is_off(module: Any) -> bool:
    """Return whether this forward must not capture: no weight gradient, or a copied module."""
    has_weight_gradient = torch.is_grad_enabled() and module.weight.requires_grad
    return module._dopr_capture is None or not has_weight_gradient


def _linear_forward(self: Any, input: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
    if _is_off(self):
        return F.linear(input, self.weight, self.bias)
    if is_sharded(input) and is_sharded(self.weight):
        z = input.to(_autocast_dtype(input))
        return tensor_parallel_linear(self._dopr_capture, z, self.weight, self.bias)
    return _captured_linear(self._dopr_capture, input, self.weight, self.bias)


def _conv1d_forward(self: Any, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
    """Forward of Hugging Face's Conv1D, a linear layer that stores its weight as (d_in, d_out)."""
    if _is_off(self):
        return F.linear(x, self.weight.mT, self.bias)
    return _captured_linear(self._dopr_capture, x, self.weight.mT, self.bias)


def _conv2d_forward(self: Any, input: Tensor) -> Tensor:  # (B, C, H, W) -> (B, d_out, H', W')
    """Forward of a convolution, a linear layer on patches (B, H'W', C kh kw).

    The backward unfolds the input into patches.
    """
    if _is_off(self):
        return nn.Conv2d.forward(self, input)
    _check_supported(self._dopr_capture, input, self.weight)
    z = input.to(_autocast_dtype(input))  # which torch keeps, too
    y = nn.Conv2d.forward(self, z)
    geometry = (self.kernel_size, self.dilation, self.padding, self.stride)
    return Tap.apply(y, z.detach(), self._dopr_capture, geometry)


def _embedding_forward(self: Any, input: Tensor) -> Tensor:  # (...) -> (..., d_out)
    """Forward of an embedding, a linear layer on one-hot inputs: Σ is diag(token frequencies)."""
    if _is_off(self):
        return nn.Embedding.forward(self, input)
    _check_supported(self._dopr_capture, input, self.weight)
    y = nn.Embedding.forward(self, input)
    return Tap.apply(y, input, self._dopr_capture, None)


_FORWARDS = (_linear_forward, _conv1d_forward, _conv2d_forward, _embedding_forward)
# A bound method is pickled by name, so an unpickled module gets the `forward` of its class.
for function in _FORWARDS:
    function.__name__ = "forward"


def _captured_linear(capture: Capture, z: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """Apply F.linear with capture.

    Casts z to the autocast dtype, so that backward captures the cast z.
    """
    _check_supported(capture, z, W)
    dtype = _autocast_dtype(z)
    if dtype != _autocast_dtype(W):
        return F.linear(z, W, b)  # raises torch's error about the dtypes
    return CapturedLinear.apply(z.to(dtype), W, b, capture)


def _check_supported(capture: Capture, z: Tensor, W: Tensor) -> None:
    """Raise RuntimeError for a nested, sparse or sharded input, or one on another device.

    FSDP2 gathers weights before the forward. Tensor parallelism shards inputs and weights.
    """
    if is_sharded(W) or is_sharded(z):
        raise RuntimeError(
            f"{capture.label}: a DTensor enters its forward, but only nn.Linear may be "
            "tensor-parallel, if both its input and its weight are DTensors: pass it to exclude=, "
            "or shard the model with FSDP2"
        )
    if z.layout != torch.strided or z.is_nested:
        raise RuntimeError(
            f"{capture.label}: its input is a nested or sparse tensor, but only a dense one can be "
            f"captured: pad it, or pass exclude=[{capture.label!r}]"
        )
    if z.device != W.device:
        raise RuntimeError(
            f"{capture.label}: the input is on {z.device}, but the weight is on {W.device}. "
            "nn.DataParallel is not supported: use DistributedDataParallel"
        )


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which F.linear uses x. Autocast casts real floats other than float64."""
    is_cast = torch.is_autocast_enabled(x.device.type) and x.is_floating_point()
    is_cast = is_cast and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if is_cast else x.dtype
