"""What a preconditioner covers and has done, in rows and in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from optim.statistics import Layer


def rows_of_the_rest(
    reasons: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> list[dict[str, Any]]:
    """A row like `Layer.report`'s for every weight that is not covered, with its reason."""
    blank = {"covered": False, "bytes": 0, "condition": None, "norm_ratio": None, "mended": 0}
    return [
        {"name": name, "shape": shapes.get(name), "reason": reason, **blank}
        for name, reason in reasons.items()
    ]


def summary(layers: Sequence[Layer], reasons: dict[str, str], *, is_attached: bool) -> str:
    """One line of what is covered and how far it is, and one for every weight that is not."""
    n_bytes = sum(layer.n_bytes for layer in layers)
    steps = _range(layer.step for layer in layers)
    refreshes = _range(layer.n_refreshes for layer in layers)
    state = "" if is_attached else "; not attached: no optimizer is preconditioned"
    return (
        f"DoPr covers {len(layers)} weights, {n_bytes / 2**20:.1f} MiB, "
        f"steps: {steps}, refreshes: {refreshes}{state}"
    ) + "".join(f"\n  not {name}: {why}" for name, why in reasons.items())


def _range(numbers: Iterable[int]) -> str:
    """`3` where all are 3, else `0 to 3`."""
    few = sorted({*numbers} or {0})
    return f"{few[0]}" if len(few) == 1 else f"{few[0]} to {few[-1]}"
