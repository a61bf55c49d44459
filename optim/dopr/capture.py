"""How input activations are seen: a layer's backward adds Σ z zᵀ of its input z to a running sum.

The backward pass is where z meets the gradient: it sees the tokens that form the weight gradient,
once, in eager mode, under torch.compile and under activation checkpointing, and nothing in
evaluation. It cannot tell a backward whose weight gradient is not wanted (`torch.autograd.grad` of
the inputs, a pass before `zero_grad`): such a pass belongs inside `paused()`. The layer's `forward`
is replaced on the instance; copies of the module are plain.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels.dispatch import Backend
from ..kernels.gram import accumulate_gram


class Capture:
    """Running sum of one layer's input statistics since it was last taken.

    Args:
        shape: of `gram`; (blocks, d/blocks, d/blocks), or (d,) for a diagonal.
        stride: one token in `stride` is looked at, beginning at `offset` (see kernels/gram.py);
            of token ids, every one is.
        is_paused: () bool on the CPU, shared by all captures of a preconditioner. A tensor, which
            the backward reads when it runs; `is_collecting` is fixed when a forward is compiled.
        kernel: who adds up, see kernels/dispatch.py; token ids are always counted by torch.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        weight: Tensor,
        stride: int,
        is_paused: Tensor,
        backend: Backend,
    ) -> None:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.gram = torch.zeros(shape, dtype=dtype, device=weight.device)  # Σ z zᵀ
        self.count = torch.zeros((), dtype=torch.int64, device=weight.device)  # tokens in it
        self.offset = torch.zeros((), dtype=torch.int64, device=weight.device)
        self.stride = stride
        self.is_paused = is_paused
        self.backend = backend
        self.rank, self.size = 0, 1  # of this process, among those that take turns with batches
        self.is_collecting = True  # whether this step is one of those that add to Σ

    def clear(self) -> None:
        self.gram.zero_()
        self.count.zero_()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model (averaged weights, say) has no capture: its layers are plain."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()  # the same for a pickled model


def _nothing() -> None:
    return None


def install(module: nn.Module, capture: Capture) -> None:
    """Replace the `forward` of this instance by the one that captures; `remove` undoes it."""
    vars(module)["_dopr_capture"] = capture  # not a tensor, not a submodule
    module.forward = MethodType(_forward_of(module), module)


def remove(module: nn.Module) -> None:
    """Make `module` plain again."""
    del module.forward, module._dopr_capture


def is_replaced(module: nn.Module) -> bool:
    """Whether someone, another preconditioner say, put a `forward` of their own on this instance.

    A copy of a captured module has our `forward`, but its capture was left behind: it is plain.
    """
    is_copy = "_dopr_capture" in vars(module) and module._dopr_capture is None
    return "forward" in vars(module) and not is_copy


def _forward_of(module: nn.Module) -> Callable[..., Tensor]:
    if isinstance(module, nn.Embedding):
        return _embedding_forward
    if isinstance(module, nn.Conv2d):
        return _conv2d_forward
    return _linear_forward if isinstance(module, nn.Linear) else _conv1d_forward


def _is_off(module: Any) -> bool:
    """Whether this forward leads to no weight gradient, or the module is a copy."""
    has_gradient = torch.is_grad_enabled() and module.weight.requires_grad
    return module._dopr_capture is None or not has_gradient


def _linear_forward(self: Any, input: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
    if _is_off(self):
        return F.linear(input, self.weight, self.bias)
    return _captured_linear(self._dopr_capture, input, self.weight, self.bias)


def _conv1d_forward(self: Any, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
    """Hugging Face's Conv1D: a linear layer whose weight is stored as (d_in, d_out)."""
    if _is_off(self):
        return F.linear(x, self.weight.mT, self.bias)
    return _captured_linear(self._dopr_capture, x, self.weight.mT, self.bias)


def _conv2d_forward(self: Any, input: Tensor) -> Tensor:  # (B, C, H, W) -> (B, d_out, H', W')
    """A linear layer on patches (B, H'W', C kh kw), which are cut out again in the backward."""
    y = nn.Conv2d.forward(self, input)
    if _is_off(self):
        return y
    geometry = (self.kernel_size, self.dilation, self.padding, self.stride)
    return _Tap.apply(y, input.detach(), self._dopr_capture, geometry)


def _embedding_forward(self: Any, input: Tensor) -> Tensor:  # (...) -> (..., d_out)
    """A linear layer on one-hot inputs: Σ is the diagonal of token frequencies."""
    y = nn.Embedding.forward(self, input)
    return y if _is_off(self) else _Tap.apply(y, input, self._dopr_capture, None)


# A bound method is pickled by its name: a pickled copy of a module gets its class's own forward.
for function in (_linear_forward, _conv1d_forward, _conv2d_forward, _embedding_forward):
    function.__name__ = "forward"


def _captured_linear(capture: Capture, z: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """F.linear with capture. Under autocast z is cast here, so that backward sees the cast z."""
    dtype = _autocast_dtype(z)
    if dtype != _autocast_dtype(W):
        return F.linear(z, W, b)  # torch's own error
    return _CapturedLinear.apply(z.to(dtype), W, b, capture)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which F.linear takes x: autocast leaves float64 and what is not real alone."""
    is_cast = torch.is_autocast_enabled(x.device.type) and x.is_floating_point()
    is_cast = is_cast and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if is_cast else x.dtype


class _CapturedLinear(torch.autograd.Function):
    """y = z Wᵀ + b, whose backward forms the weight gradient in fp32 and captures z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, W: Tensor, b: Tensor | None, capture: Capture) -> Tensor:
        ctx.save_for_backward(z, W)
        ctx.capture = capture
        ctx.b_dtype = None if b is None else b.dtype
        return F.linear(z, W.to(z.dtype), None if b is None else b.to(z.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        z, W = ctx.saved_tensors  # (..., d_in), (d_out, d_in)
        if ctx.capture.is_collecting:
            _accumulate(ctx.capture, z)
        rows = grad_y.reshape(-1, W.shape[0])  # (n, d_out)
        with torch.autocast(z.device.type, enabled=False):  # backward may be called under it
            grad_z = grad_y @ W.to(grad_y.dtype) if ctx.needs_input_grad[0] else None
            G = _matmul_fp32(rows.mT, z.reshape(-1, W.shape[1])).to(W.dtype)  # (d_out, d_in)
        grad_b = None
        if ctx.b_dtype is not None:
            grad_b = rows.sum(0, dtype=_at_least_fp32(rows)).to(ctx.b_dtype)
        return grad_z, G, grad_b, None


class _Tap(torch.autograd.Function):
    """The identity on y, whose backward captures `z`, the input that y was computed from.

    `geometry`, of a convolution, is how z unfolds into patches; None: z is captured as it is.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, z: Tensor, capture: Capture, geometry: tuple[Any, ...] | None
    ) -> Tensor:
        ctx.save_for_backward(z)
        ctx.capture, ctx.geometry = capture, geometry
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (z,) = ctx.saved_tensors
        if ctx.capture.is_collecting:
            patches = z if ctx.geometry is None else F.unfold(z, *ctx.geometry).mT
            _accumulate(ctx.capture, patches)
        return grad_y, None, None, None


def _accumulate(capture: Capture, z: Tensor) -> None:
    """Add the statistics of z, activations (..., d) or token ids, to the running sum."""
    S, count, is_paused = capture.gram, capture.count, capture.is_paused
    if S.dim() == 1:
        accumulate_frequencies(S, count, z, is_paused)
        return
    z = z if z.dim() > 1 else z[None]
    stride, backend, turn = capture.stride, capture.backend, (capture.rank, capture.size)
    accumulate_gram(S, count, z, capture.offset, is_paused, stride, backend, *turn)


@torch.library.custom_op(
    "dopr::accumulate_frequencies",
    mutates_args=("S", "count"),
    tags=(torch.Tag.cudagraph_unsafe,),  # a graph would replay what `is_paused` was
)
def accumulate_frequencies(S: Tensor, count: Tensor, idx: Tensor, is_paused: Tensor) -> None:
    """S[t] += how often id t is in idx, count += ids, unless paused: diag(Σ z zᵀ) of one-hot z."""
    if is_paused:
        return
    S += torch.bincount(idx.flatten(), minlength=S.numel())
    count += idx.numel()


@accumulate_frequencies.register_fake
def _(S: Tensor, count: Tensor, idx: Tensor, is_paused: Tensor) -> None:
    return None


def _at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _matmul_fp32(A: Tensor, B: Tensor) -> Tensor:
    """A @ B with fp32 sums and an fp32 result; half-precision inputs stay on tensor cores."""
    if A.is_cuda and A.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(A, B, out_dtype=torch.float32)
    dtype = _at_least_fp32(A)
    return A.to(dtype) @ B.to(dtype)
