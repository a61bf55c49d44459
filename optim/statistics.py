"""What is known of each covered layer's inputs, Σ, and the P that follows from it."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, get_args

import torch

from kernels.cholesky import Inverse, damped_inverse_root
from optim.capture import Capture
from optim.covariance import diagonal_inverse_root, ema_update, mean_eigenvalue
from optim.coverage import Covered

INVERSES = get_args(Inverse)
log = logging.getLogger("dopr")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of activation preconditioning; see ActivationPreconditioner for their meaning.

    Raises:
        ValueError: everything that is out of range, one line each.
    """

    gamma: float
    sigma_beta: float | None
    refresh_every: int
    collect_every: int
    token_stride: int
    exponent: int
    inverse: Inverse
    trace_normalized: bool
    block_diagonal: int | None

    def __post_init__(self) -> None:
        problems = settings_problems(vars(self))
        if problems:
            raise ValueError("\n".join(problems))


def settings_problems(settings: dict[str, Any]) -> list[str]:
    """Everything that is wrong with these settings, one line each."""
    problems = []
    if not 0 <= settings["gamma"] < float("inf"):
        problems.append(f"gamma={settings['gamma']}: must be finite and at least 0")
    beta = settings["sigma_beta"]
    if beta is not None and not 0 <= beta < 1:
        problems.append(f"sigma_beta={beta}: must be in [0, 1), or None for no average")
    for key in ("refresh_every", "collect_every", "token_stride"):
        if settings[key] < 1:
            problems.append(f"{key}={settings[key]}: must be at least 1")
    if not problems and settings["refresh_every"] % settings["collect_every"]:
        problems.append(
            f"collect_every={settings['collect_every']}: must divide "
            f"refresh_every={settings['refresh_every']}, so that a refresh has fresh statistics"
        )
    if settings["exponent"] not in (1, 2, 4):
        problems.append(f"exponent={settings['exponent']}: must be 1, 2 or 4")
    if settings["inverse"] not in INVERSES:
        problems.append(f"inverse={settings['inverse']!r}: must be one of {', '.join(INVERSES)}")
    width = settings["block_diagonal"]
    if width is not None and width < 1:
        problems.append(f"block_diagonal={width}: must be at least 1, or None for no blocks")
    return problems


class Layer:
    """One covered layer: what its inputs were like, and the P made from that."""

    TENSORS = ("sigma", "P", "damping", "norm_ratio")
    NUMBERS = ("step", "n_refreshes", "n_mended")

    def __init__(self, covered: Covered, block_diagonal: int | None, stride: int) -> None:
        self.covered = covered
        self.name = covered.name
        d = covered.d_in
        blocks = _n_blocks(d, block_diagonal)
        shape = (d,) if covered.is_diagonal else (blocks, d // blocks, d // blocks)
        self.capture = Capture(shape, covered.weight, stride)
        self.sigma = torch.zeros_like(self.capture.gram)  # Σ
        self.P = torch.zeros_like(self.capture.gram)  # (Σ + γ̄ I)^(-1/p), trace-normalised
        self.damping = torch.zeros((), dtype=self.sigma.dtype, device=self.sigma.device)  # γ̄
        self.step = 0  # steps of the optimizer that owns the weight
        self.n_refreshes = 0  # 0: there is no P yet
        self.n_mended = 0  # times that an inverse or a non-finite sum had to be mended
        self.norm_ratio = torch.ones_like(self.damping)  # ‖M‖ / ‖G‖ at the last refresh

    def state_dict(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in (*self.TENSORS, *self.NUMBERS)}
        return own | {"gram": self.capture.gram, "count": self.capture.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key in self.TENSORS:
            getattr(self, key).copy_(state[key])
        for key in self.NUMBERS:
            setattr(self, key, state[key])
        self.capture.gram.copy_(state["gram"])
        self.capture.count.copy_(state["count"])

    def mended(self, what: str) -> None:
        """Something went wrong and was mended: counted and logged, never silent."""
        self.n_mended += 1
        log.warning("%s: %s", self.name, what)

    def n_bytes(self) -> int:
        """Memory of Σ, its running sum and P."""
        return 3 * self.sigma.numel() * self.sigma.element_size()


def _n_blocks(d: int, widest: int | None) -> int:
    """The smallest number of equal blocks of at most `widest` that d divides into."""
    if widest is None:
        return 1
    return next(blocks for blocks in range(-(-d // widest), d + 1) if d % blocks == 0)


def refresh(layers: list[Layer], settings: Settings) -> list[Layer]:
    """New Σ and P for the layers that have new statistics; returns these layers.

    Raises:
        RuntimeError: a layer has a gradient but its activations were not seen.
        FloatingPointError: activations are not finite and there is no earlier P to keep, or Σ has
            no inverse at any damping.
    """
    fresh = [layer for layer in layers if _has_statistics(layer)]
    by_shape: dict[torch.Size, list[Layer]] = defaultdict(list)
    for layer in fresh:
        batch = layer.capture.gram / layer.capture.count
        layer.capture.clear()
        layer.n_refreshes += 1
        layer.sigma = ema_update(layer.sigma, batch, settings.sigma_beta, layer.n_refreshes)
        by_shape[layer.sigma.shape].append(layer)
    for group in by_shape.values():
        _invert(group, settings)
    return fresh


def _has_statistics(layer: Layer) -> bool:
    """Whether there is a running sum to use. One that is not finite is dropped, and counted."""
    capture, grad = layer.capture, layer.covered.weight.grad
    if capture.count == 0 or not capture.gram.any():  # unused in this step, or dead inputs
        if grad is not None and grad.any():
            raise RuntimeError(
                f"{layer.name} has a gradient but its input activations were not seen: its forward "
                "was bypassed, or the model was compiled before the preconditioner was made. "
                f"Exclude it with exclude=[{layer.name!r}]"
            )
        return False
    if capture.gram.isfinite().all():
        return True
    capture.clear()
    if layer.n_refreshes == 0:
        raise FloatingPointError(f"the first activations seen by {layer.name} are not finite")
    layer.mended("activations are not finite; the last P is kept")
    return False


def _invert(layers: list[Layer], settings: Settings) -> None:
    """P of several layers whose Σ have one shape, as one batch."""
    p = settings.exponent
    means = torch.stack([mean_eigenvalue(layer.sigma) for layer in layers])  # (N,)
    sigma = torch.stack([layer.sigma for layer in layers])  # (N, blocks, b, b) or (N, d)
    damping = (settings.gamma * means)[:, None].expand(sigma.shape[:2])  # (N, blocks) or (N, d)
    if sigma.dim() == 2:
        P = diagonal_inverse_root(sigma, damping, p)
    else:
        P, damping, failures = damped_inverse_root(sigma, damping, p, inverse=settings.inverse)
        for layer, used, n_failed in zip(layers, damping, failures.sum(1).tolist(), strict=True):
            if n_failed:
                layer.mended(f"{n_failed} inverses failed; damping is now {used.max():.1e}")
    for i, layer in enumerate(layers):
        layer.damping = damping[i].amax()
        layer.P = P[i] * means[i] ** (1 / p) if settings.trace_normalized else P[i]
