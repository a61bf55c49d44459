"""Functions that torch.compile must not trace: operators in compiled code, plain calls elsewhere.

The backward of a layer calls them. Each reads whether it is paused when it runs, so a CUDA graph,
which would replay what was read when it was recorded, must leave it out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode


def opaque(
    name: str, mutates_args: tuple[str, ...]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function the operator `name` where torch traces or dispatches, and a call elsewhere.

    To call an operator costs much beside the sum of a small layer.

    Args:
        mutates_args: the arguments that the function changes in place.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        operator = torch.library.custom_op(
            name, function, mutates_args=mutates_args, tags=(torch.Tag.cudagraph_unsafe,)
        )
        operator.register_fake(_nothing)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> None:
            if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
                operator(*args, **kwargs)
            else:
                function(*args, **kwargs)

        return call

    return decorate


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def check_not_recording(device: torch.device) -> None:
    """Raise RuntimeError while a CUDA graph is recorded, which would replay old decisions."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "activation preconditioning cannot be recorded in a CUDA graph: keep the backward and "
            "the step out of torch.cuda.graph and make_graphed_callables, or use "
            'torch.compile(mode="reduce-overhead"), which leaves these operators out'
        )
