"""What is known of each covered layer's inputs, Σ, and the P that follows from it."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from kernels.cholesky import Inverse, damped_inverse_root
from optim.capture import Capture
from optim.covariance import (
    condition_number,
    diagonal_inverse_root,
    ema_update,
    mean_eigenvalue,
)
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
    embeddings: bool

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
        if not isinstance(settings[key], int) or settings[key] < 1:
            problems.append(f"{key}={settings[key]}: must be a whole number, at least 1")
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
    if width is not None and (not isinstance(width, int) or width < 1):
        problems.append(f"block_diagonal={width}: must be a whole number, or None for no blocks")
    if settings["embeddings"] and settings["gamma"] == 0:
        problems.append("gamma=0 with embeddings: tokens that do not occur need a gamma above 0")
    return problems


class Layer:
    """One covered layer: what its inputs were like, and the P made from that."""

    TENSORS = ("sigma", "P", "damping", "norm_ratio")
    NUMBERS = ("step", "next_refresh", "n_refreshes", "n_mended")

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
        self.next_refresh = 0  # the step from which on new statistics are due
        self.n_refreshes = 0  # 0: there is no P yet
        self.n_mended = 0  # times that an inverse or a non-finite sum had to be mended
        self.norm_ratio = torch.ones_like(self.damping)  # ‖M‖ / ‖G‖ at the last refresh

    def next_sigma(self, beta: float | None) -> Tensor:
        """Σ with what was captured since the last refresh."""
        batch = self.capture.gram / self.capture.count
        return ema_update(self.sigma, batch, beta, self.n_refreshes + 1)

    def state_problems(self, state: dict[str, Any]) -> list[str]:
        """Why `load_state_dict` cannot take this state; empty if it can."""
        missing = self.state_dict().keys() - state.keys()
        if missing:
            return [f"{self.name} has no {', '.join(sorted(missing))}"]
        if state["sigma"].shape != self.sigma.shape:
            got, wanted = tuple(state["sigma"].shape), tuple(self.sigma.shape)
            return [f"{self.name}: Σ is {got}, wanted {wanted}"]
        return []

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

    @property
    def n_bytes(self) -> int:
        """Memory of Σ, its running sum and P."""
        return 3 * self.sigma.numel() * self.sigma.element_size()

    def report(self) -> dict[str, Any]:
        """What is worth knowing; the condition number costs an eigendecomposition."""
        is_ready = self.n_refreshes > 0
        return {
            "name": f"{self.name}.weight",
            "shape": tuple(self.covered.weight.shape),
            "covered": True,
            "reason": "",
            "bytes": self.n_bytes,
            "condition": condition_number(self.sigma, self.damping) if is_ready else None,
            "norm_ratio": self.norm_ratio.item() if is_ready else None,
            "mended": self.n_mended,
        }


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
    alike: dict[Any, list[Layer]] = defaultdict(list)
    for layer in fresh:
        alike[layer.sigma.shape, layer.sigma.dtype, layer.sigma.device].append(layer)
    for group in alike.values():
        _refresh_alike(group, settings)
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
    if capture.gram.isfinite().all() and mean_eigenvalue(capture.gram).isfinite():
        return True
    capture.clear()
    if layer.n_refreshes == 0:
        raise FloatingPointError(f"the first activations seen by {layer.name} are not finite")
    layer.mended("activations are not finite; the last P is kept")
    return False


def _refresh_alike(layers: list[Layer], settings: Settings) -> None:
    """Σ and P of several layers whose Σ are alike, as one batch; an error changes none of them."""
    p, beta = settings.exponent, settings.sigma_beta
    sigmas = [layer.next_sigma(beta) for layer in layers]
    means = torch.stack([mean_eigenvalue(sigma) for sigma in sigmas])  # (N,)
    sigma = torch.stack(sigmas)  # (N, blocks, b, b) or (N, d)
    damping = (settings.gamma * means)[:, None].expand(sigma.shape[:2])  # (N, blocks) or (N, d)
    if sigma.dim() == 2:
        P = diagonal_inverse_root(sigma, damping, p)
    else:
        P, damping, failures = damped_inverse_root(sigma, damping, p, inverse=settings.inverse)
        for layer, used, n_failed in zip(layers, damping, failures.sum(1).tolist(), strict=True):
            if n_failed:
                layer.mended(f"{n_failed} inverses failed; damping is now {used.max():.1e}")
    for i, layer in enumerate(layers):
        layer.sigma, layer.damping = sigmas[i], damping[i].amax()
        layer.P = P[i] * means[i] ** (1 / p) if settings.trace_normalized else P[i].clone()
        layer.n_refreshes += 1
        layer.next_refresh = (layer.step // settings.refresh_every + 1) * settings.refresh_every
        layer.capture.clear()
