"""Hold a layer's statistics: the covariance Σ of its inputs, and the P computed from it.

    γ̄ = γ tr(Σ)/d_in
    P = (tr(Σ)/d_in)^(1/p) (Σ + γ̄ I)^(-1/p)    the first factor only if `trace_normalized`

Σ and P are block-diagonal, stored as (blocks, b, b) with blocks · b = d_in. For an embedding they
are diagonal, stored as (d_in,). With `fresh_mean`, the layer stores the centred covariance C and
the mean μ instead of Σ = C + μ μᵀ, and computes P from C (mean.py).
"""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.deflation import first_deflation_basis
from ..kernels.newton_schulz import full_precision
from .capture import Capture
from .coverage import CoveredLayer
from .mean import centred, uncentred
from .settings import DoprSettings

log = logging.getLogger("dopr")


def n_covariance_blocks(d: int, max_width: int | None) -> int:
    """Return the smallest number of equal blocks, at most `max_width` wide, that divides d."""
    if max_width is None:
        return 1
    return next(n for n in range(-(-d // max_width), d + 1) if d % n == 0)


def ema_update(sigma: Tensor, batch: Tensor, beta: float | None, n_updates: int) -> Tensor:
    """Return the bias-corrected moving average Σ, updated with the covariance `batch`.

    Σ <- Σ + (1-β) / (1-βⁿ) (Σ_batch - Σ), where Σ_batch is the covariance since the last refresh
    and n counts this update. With β = None, returns Σ_batch.
    """
    if beta is None or n_updates == 1:
        return batch
    return sigma + (1 - beta) / (1 - beta**n_updates) * (batch - sigma)


def mean_eigenvalue(sigma: Tensor) -> Tensor:  # (..., blocks, b, b) -> (...); (d,) -> ()
    """Return tr(Σ) / d_in over all blocks."""
    if sigma.dim() == 1:
        return sigma.mean()
    return sigma.diagonal(dim1=-2, dim2=-1).mean(dim=(-2, -1))


def total_mean_eigenvalue(sigma: Tensor, mean: Tensor) -> Tensor:  # ()
    """Return tr(Σ) / d_in, for Σ = C + μ μᵀ if there is a mean, else for `sigma` itself."""
    if not mean.numel():
        return mean_eigenvalue(sigma)
    return mean_eigenvalue(sigma) + mean.square().mean()


def condition_bound(d: int, gamma: float) -> float:
    """Return d/γ = tr(Σ)/γ̄, where d is the total width of the blocks.

    This is an upper bound on tr(block)/γ̄, and so on λmax(block)/γ̄, of every block of Σ.
    """
    return d / gamma if gamma else math.inf


def diagonal_inverse_root(sigma: Tensor, damping: Tensor, p: int) -> Tensor:
    """Return (σ + γ̄)^(-1/p) of a diagonal covariance σ (..., d_in)."""
    return (sigma + damping) ** (-1 / p)


def apply_P(G: Tensor, P: Tensor) -> Tensor:
    """Return M = G P for a gradient G (d_out, d_in).

    Computes in at least fp32, whatever autocast and the matmul precision are set to.

    Args:
        P: (blocks, b, b), or (d_in,) for a diagonal.
    Source: Zhang et al., arXiv 2606.06418 (activation preconditioning).
    """
    G = G.to(P.dtype)
    if P.dim() == 1:
        return G * P
    covariance_blocks, b, _ = P.shape
    with full_precision(G.device.type):
        if covariance_blocks == 1:
            return G @ P[0]
        stacked = G.view(-1, covariance_blocks, b).transpose(0, 1)  # (blocks, d_out, b)
        return torch.bmm(stacked, P).transpose(0, 1).reshape(G.shape)


def norms(M: Tensor, G: Tensor) -> Tensor:  # (2,)
    """Return ‖M‖ and ‖G‖."""
    return torch.stack([torch.linalg.vector_norm(M), torch.linalg.vector_norm(G, dtype=M.dtype)])


def norm_ratio(norms: Tensor) -> Tensor:  # ()
    """Return ‖M‖ / ‖G‖, or 0 if G is zero."""
    return norms[0] / norms[1].clamp_min(torch.finfo(norms.dtype).tiny)


def condition_number(sigma: Tensor, damping: Tensor) -> float:
    """Return λmax / λmin of Σ + γ̄ I over all blocks. This costs an eigendecomposition.

    Args:
        damping: γ̄ of each block (blocks,), or one γ̄ for all blocks, () or (1,).
    """
    values = sigma if sigma.dim() == 1 else torch.linalg.eigvalsh(sigma.double())
    values = values.double() + damping.double()[..., None]  # (blocks, b)
    return float(values.max() / values.min().clamp_min(0))


class Statistics(NamedTuple):
    """Hold what a P is computed from."""

    sigma: Tensor  # Σ, or C; (blocks, b, b), or (d,) for a diagonal
    mean_eigenvalue: Tensor  # tr(Σ) / d, (); of Σ = C + μ μᵀ with `fresh_mean`
    deflation_basis: Tensor | None  # U (blocks, b, k), the deflation basis (kernels/deflation.py)


class InverseRoot(NamedTuple):
    """Hold a layer's P and how it was computed."""

    P: Tensor  # (blocks, b, b), or (d,) for a diagonal
    damping: Tensor  # (blocks,) γ̄, larger in blocks whose inverse needed more damping
    deflation_basis: Tensor | None  # U (blocks, b, k), the deflation basis (kernels/deflation.py)
    n_failed: int  # number of failed attempts
    is_damped_more: bool  # whether a block needed more damping than γ asks for


class Layer:
    """Hold the statistics of one covered layer's inputs, and the P computed from them."""

    TENSORS = ("sigma", "P", "damping", "norm_ratio")
    NUMBERS = ("step", "next_refresh", "n_refreshes", "n_fallbacks")

    def __init__(self, covered: CoveredLayer, settings: DoprSettings, is_paused: Tensor) -> None:
        self.covered = covered
        self.name = covered.name
        # The name for messages. A model that is itself the layer has the name "".
        self.label = covered.name or type(covered.module).__name__
        self.settings = settings
        d, max_width = covered.d_in, settings.block_diagonal
        covariance_blocks = 1 if covered.is_diagonal else n_covariance_blocks(d, max_width)
        b = d // covariance_blocks
        self.capture = Capture(
            (d,) if covered.is_diagonal else (covariance_blocks, b, b),
            covered.weight,
            settings.token_stride,
            is_paused,
            settings.fresh_mean and not covered.is_diagonal,
            settings.count_masked,
            settings.backend,
            self.label,
        )
        self.sigma = torch.zeros_like(self.capture.gram)  # Σ
        self.P = torch.zeros_like(self.capture.gram)  # zero before the first refresh
        self.damping = self.sigma.new_zeros(covariance_blocks)  # γ̄ of each block
        self.deflation_basis = None  # U, (blocks, b, k), carried from one inverse to the next
        if settings.inverse == "newton_schulz" and not covered.is_diagonal:
            self.deflation_basis = first_deflation_basis(self.sigma, settings.exponent)
        self.has_mean = self.capture.column_sums is not None
        self.mean = self.sigma.new_zeros(self.sigma.shape[:-1] if self.has_mean else 0)  # μ
        self.mean_eigenvalue = self.sigma.new_zeros(())  # of Σ at the last refresh
        self.norm_ratio = self.sigma.new_ones(())  # ‖M‖ / ‖G‖ at the last refresh
        self.step = 0  # steps of the optimizer that holds the weight
        self.next_refresh = 0  # first step at which a refresh is due
        self.n_refreshes = 0  # 0: there is no P yet
        self.n_fallbacks = 0  # failed inverses and unusable sums that a fallback replaced
        self.made_with = settings.p_settings  # the settings that P was computed with

    @property
    def is_due(self) -> bool:
        return self.step >= self.next_refresh

    @property
    def following_refresh(self) -> int:
        """The first scheduled step after the current one."""
        every = self.settings.refresh_every
        return (self.step // every + 1) * every

    def schedule_next(self) -> None:
        """Set whether, and from which offset, the coming step adds to the statistics."""
        on_schedule = self.step % self.settings.collect_every == 0
        self.capture.is_collecting = on_schedule or self.is_due
        self.capture.offset.fill_(self.step // self.settings.collect_every)

    def next_statistics(self, gram: Tensor, count: Tensor, gram_mean: Tensor) -> Statistics:
        """Return the statistics updated with those of the tokens of all processes.

        Args:
            gram: the sum of z zᵀ over these tokens.
            gram_mean: their mean (blocks, b), used with `fresh_mean`.
        """
        batch = gram / count
        if self.has_mean:
            batch = centred(batch, gram_mean)
        sigma = ema_update(self.sigma, batch, self.settings.sigma_beta, self.n_refreshes + 1)
        return Statistics(sigma, total_mean_eigenvalue(sigma, self.mean), self.deflation_basis)

    def set_inverse_root(self, new: InverseRoot) -> None:
        """Use a new P from now on. If any attempt failed, count one fallback, however many did."""
        self.P, self.damping, self.deflation_basis = new.P, new.damping, new.deflation_basis
        self.made_with = self.settings.p_settings
        if new.n_failed:
            is_iterative = self.settings.inverse == "newton_schulz"
            failure = (
                "Newton-Schulz failed, redone by Cholesky" if is_iterative else "Cholesky failed"
            )
            more = f"; damping is now {new.damping.max():.1e}" if new.is_damped_more else ""
            self.count_fallback(failure + more)

    def count_fallback(self, reason: str) -> None:
        """Count a fallback, and log the 1st, 2nd, 4th, 8th, ... as a warning."""
        self.n_fallbacks += 1
        if self.n_fallbacks.bit_count() == 1:
            log.warning("%s: %s (fallbacks so far: %d)", self.label, reason, self.n_fallbacks)

    def check_device_and_dtype(self) -> None:
        """Raise ValueError if the weight was moved or cast after construction."""
        weight, sigma = self.covered.weight, self.sigma
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if (sigma.device, sigma.dtype) != (weight.device, dtype):
            raise ValueError(
                f"{self.label}.weight is {weight.dtype} on {weight.device}, but its statistics are "
                f"{sigma.dtype} on {sigma.device}: construct the preconditioner after the model is "
                "on its device and in its dtype"
            )

    @property
    def n_bytes(self) -> int:
        """Memory of Σ, its running sum, P, U, μ and the sums of z, in bytes."""
        more = (self.deflation_basis, self.mean, self.capture.column_sums)
        return 3 * self.sigma.nbytes + sum(0 if each is None else each.nbytes for each in more)

    def report(self, *, condition: bool) -> dict[str, Any]:
        """Return the layer's row of the report; `condition` costs an eigendecomposition."""
        has_P = self.n_refreshes > 0
        sigma = uncentred(self.sigma, self.mean) if self.has_mean else self.sigma
        kappa = condition_number(sigma, self.damping) if condition and has_P else None
        return {
            "name": self.covered.full_name,
            "shape": tuple(self.covered.weight.shape),
            "covered": True,
            "reason": "",
            "bytes": self.n_bytes,
            "condition": kappa,
            "norm_ratio": self.norm_ratio.item() if has_P else None,
            "fallbacks": self.n_fallbacks,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the state, without copying them."""
        own = {key: getattr(self, key) for key in self.TENSORS}
        U = {} if self.deflation_basis is None else {"deflation_basis": self.deflation_basis}
        means = {"mean": self.mean, "mean_eigenvalue": self.mean_eigenvalue}
        return own | U | (means if self.has_mean else {}) | self.running_sums()

    def running_sums(self) -> dict[str, Tensor]:
        """Return the sums that backward passes change, without copying them."""
        sums = {"gram": self.capture.gram, "count": self.capture.count}
        columns = self.capture.column_sums
        return sums if columns is None else sums | {"column_sums": columns}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this process. The running sums are copied, as they change."""
        numbers = {key: getattr(self, key) for key in (*self.NUMBERS, "made_with")}
        running = {key: each.clone() for key, each in self.running_sums().items()}
        return self.tensors() | running | numbers

    def statistics_in(self, state: dict[str, Any]) -> Statistics:
        """Return the statistics of a state, with the current U if the state has none."""
        U = self.deflation_basis
        U = U if U is None else state.get("deflation_basis", U).to(U, copy=True)
        sigma = state["sigma"].to(self.sigma)
        mean = state["mean_eigenvalue"].to(sigma) if self.has_mean else mean_eigenvalue(sigma)
        return Statistics(sigma, mean, U)

    def load_state_dict(self, state: dict[str, Any], *, with_sums: bool = True) -> None:
        """Load a state that `state_problems` accepted.

        Copies tensors, so earlier state dicts stay valid. Only one process loads the running sums
        (`with_sums`); the others start from zero.
        """
        for key in (*self.TENSORS, *(("mean", "mean_eigenvalue") if self.has_mean else ())):
            setattr(self, key, state[key].to(getattr(self, key), copy=True))
        self.deflation_basis = self.statistics_in(state).deflation_basis
        self.capture.clear()  # in place, because compiled graphs hold `gram` and `count`
        if with_sums:
            for key, own in self.running_sums().items():
                own.copy_(state[key])
        for key in (*self.NUMBERS, "made_with"):
            setattr(self, key, state[key])
        every = self.settings.refresh_every
        # the saved run may have refreshed less often
        self.next_refresh = min(self.next_refresh, -(-self.step // every) * every)
        self.schedule_next()
