"""Hold a layer's statistics: the covariance Σ of its inputs, and the P computed from it.

statistics.py has the formulas. With `fresh_mean`, the layer stores the centred covariance C and the
mean μ instead of Σ = C + μ μᵀ, and computes P from C (mean.py).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..kernels.deflation import first_deflation_basis
from .capture import Capture
from .coverage import CoveredLayer
from .mean import centred, uncentred
from .settings import DoprSettings
from .statistics import (
    InverseRoot,
    Statistics,
    condition_number,
    ema_update,
    mean_eigenvalue,
    n_covariance_blocks,
    total_mean_eigenvalue,
)

log = logging.getLogger("dopr")


class Layer:
    """Hold the statistics of one covered layer's inputs, and the P computed from them."""

    # What only the processes that hold the statistics have (ownership.py); dimension 0: blocks.
    HELD = ("sigma", "P", "damping", "deflation_basis", "gram")
    NUMBERS = ("step", "next_refresh", "n_refreshes", "n_fallbacks")

    def __init__(
        self,
        covered: CoveredLayer,
        settings: DoprSettings,
        is_paused: Tensor,
        *,
        is_held: bool = True,
    ) -> None:
        self.covered = covered
        self.name = covered.name
        # The name for messages. A model that is itself the layer has the name "".
        self.label = covered.name or type(covered.module).__name__
        self.settings = settings
        d, max_width = covered.d_in, settings.block_diagonal
        self.blocks = 1 if covered.is_diagonal else n_covariance_blocks(d, max_width)
        b = d // self.blocks
        self.shape = (d,) if covered.is_diagonal else (self.blocks, b, b)  # of Σ and P
        self.capture = Capture(
            self.shape,
            covered.weight,
            settings.token_stride,
            is_paused,
            settings.fresh_mean and not covered.is_diagonal,
            settings.count_masked,
            settings.backend,
            self.label,
            covered.padding_idx,
        )
        self._allocate(is_held or covered.is_diagonal)
        self.has_mean = self.capture.column_sums is not None
        self.mean = self.sigma.new_zeros(self.shape[:-1] if self.has_mean else 0)  # μ
        self.mean_eigenvalue = self.sigma.new_zeros(())  # of Σ at the last refresh
        self.norm_ratio = self.sigma.new_ones(())  # ‖M‖ / ‖G‖ at the last refresh
        self.step = 0  # steps of the optimizer that holds the weight
        self.next_refresh = 0  # first step at which a refresh is due
        self.n_refreshes = 0  # 0: there is no P yet
        self.n_fallbacks = 0  # failed inverses and unusable sums that a fallback replaced
        self.made_with = settings.p_settings  # the settings that P was computed with

    def _allocate(self, is_held: bool) -> None:
        """Set the statistics to zero. A process that does not hold them has 0 blocks of them."""
        self.owner: int | None = None  # the rank that holds the statistics; None: all do
        self.is_held = is_held
        blocks = self.shape[0] if is_held else 0
        shape = (blocks, *self.shape[1:])
        self.capture.gram = self.capture.count.new_zeros(shape, dtype=self.capture.dtype)
        self.sigma = torch.zeros_like(self.capture.gram)  # Σ
        self.P = torch.zeros_like(self.capture.gram)  # zero before the first refresh
        self.damping = self.sigma.new_zeros(self.blocks if is_held else 0)  # γ̄ of each block
        self.deflation_basis = None  # U, (blocks, b, k), carried from one inverse to the next
        if self.settings.inverse == "newton_schulz" and not self.covered.is_diagonal:
            self.deflation_basis = first_deflation_basis(self.sigma, self.settings.exponent)

    def hold(self, owner: int | None, rank: int) -> None:
        """Hold the statistics if `rank`, this process, is the owner or there is none."""
        is_held = owner in (None, rank)
        if is_held != self.is_held:
            self._allocate(is_held)
        self.owner = owner

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
        self.capture.offset.fill_(self._first_offset)

    @property
    def _first_offset(self) -> int:
        return self.step // self.settings.collect_every

    @property
    def was_seen(self) -> Tensor:  # () bool
        """Whether a backward of this step, which collects, was captured, if only masked tokens."""
        return self.capture.offset != self._first_offset

    @property
    def gram(self) -> Tensor:
        """S, the sum of z zᵀ; zeros if it was freed, and without blocks if it is held elsewhere."""
        S = self.capture.gram
        return self.sigma.new_zeros(self.shape) if self.is_held and not len(S) else S

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
        self.mean_eigenvalue = new.mean_eigenvalue
        self.made_with = self.settings.p_settings
        if new.n_failed:
            is_iterative = self.settings.inverse == "newton_schulz"
            failure = (
                "Newton-Schulz failed, redone by Cholesky" if is_iterative else "Cholesky failed"
            )
            shown = f"{new.damping.max():.1e}" if self.is_held else "larger"
            more = f"; damping is now {shown}" if new.is_damped_more else ""
            self.count_fallback(failure + more)

    def count_fallback(self, reason: str) -> None:
        """Count a fallback, and log the 1st, 2nd, 4th, 8th, ... as a warning."""
        self.n_fallbacks += 1
        if self.n_fallbacks.bit_count() == 1:
            log.warning("%s: %s (fallbacks so far: %d)", self.label, reason, self.n_fallbacks)

    def check_device_and_dtype(self) -> None:
        """Raise ValueError if the weight was moved or cast after construction, or has no values."""
        weight, sigma = self.covered.weight, self.sigma
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if (sigma.device, sigma.dtype) != (weight.device, dtype):
            raise ValueError(
                f"{self.label}.weight is {weight.dtype} on {weight.device}, but its statistics are "
                f"{sigma.dtype} on {sigma.device}: construct the preconditioner after the model is "
                "on its device and in its dtype"
            )
        if weight.is_meta:
            raise ValueError(
                f"{self.label}.weight is on the meta device, without values: construct the "
                "preconditioner after the model is on its device"
            )

    @property
    def n_bytes(self) -> int:
        """Memory in this process of Σ, its running sum, P, U, μ and the sums of z, in bytes."""
        held = (self.sigma, self.P, self.capture.gram, self.deflation_basis, self.mean)
        held = (*held, self.capture.column_sums)
        return sum(0 if each is None else each.nbytes for each in held)

    def report(self, *, condition: bool) -> dict[str, Any]:
        """Return the layer's row of the report; `condition` costs an eigendecomposition."""
        has_P = self.n_refreshes > 0
        sigma = uncentred(self.sigma, self.mean) if self.has_mean and self.is_held else self.sigma
        is_known = condition and has_P and self.is_held
        kappa = condition_number(sigma, self.damping) if is_known else None
        return {
            "name": self.covered.full_name,
            "shape": tuple(self.covered.weight.shape),
            "covered": True,
            "reason": "",
            "block_width": None if self.covered.is_diagonal else self.shape[-1],  # of Σ
            "bytes": self.n_bytes,
            "condition": kappa,
            "norm_ratio": self.norm_ratio.item() if has_P else None,
            "fallbacks": self.n_fallbacks,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the state, without copying them."""
        U = {} if self.deflation_basis is None else {"deflation_basis": self.deflation_basis}
        return {key: getattr(self, key) for key in self._keys()} | U | self.running_sums()

    def _keys(self) -> tuple[str, ...]:
        """Return the attributes that every state has and that no backward pass changes."""
        means = ("mean", "mean_eigenvalue") if self.has_mean else ()
        return "sigma", "P", "damping", "norm_ratio", *means

    def needs(self, key: str) -> bool:
        """Return whether this process reads `key` when it loads a state."""
        return self.is_held or key not in self.HELD

    def whole(self, key: str) -> Tensor:
        """Return a tensor without memory, of the shape that `tensors()[key]` has where it is held.

        It is on the meta device.
        """
        own = self.tensors()[key]
        is_sharded = key in self.HELD and self.owner is not None
        shape = (self.blocks, *own.shape[1:]) if is_sharded else own.shape
        return own.new_empty(shape, device="meta")

    def running_sums(self) -> dict[str, Tensor]:
        """Return the sums that backward passes change, without copying them."""
        sums = {"gram": self.capture.gram, "count": self.capture.count}
        columns = self.capture.column_sums
        return sums if columns is None else sums | {"column_sums": columns}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this process. The running sums are copied, as they change."""
        numbers = {key: getattr(self, key) for key in (*self.NUMBERS, "made_with")}
        running = self.running_sums() | {"gram": self.gram}  # zeros if it was freed
        copies = {key: each.clone() for key, each in running.items()}
        return self.tensors() | copies | numbers

    def statistics_in(self, state: dict[str, Any]) -> Statistics:
        """Return the statistics of a state, with the current U if the state has none."""
        U = self.deflation_basis
        U = U if U is None else state.get("deflation_basis", U).to(U, copy=True)
        sigma = state["sigma"].to(self.sigma)
        mean = state["mean_eigenvalue"].to(sigma) if self.has_mean else mean_eigenvalue(sigma)
        return Statistics(sigma, mean, U)

    def load_state_dict(
        self, state: dict[str, Any], *, with_tokens: bool = True, with_gram: bool = True
    ) -> None:
        """Load a state that `state_problems` accepted.

        Copies tensors, so earlier state dicts stay valid. The sums of all processes are in one
        state, so only one process loads the number of tokens and the sum of z (`with_tokens`) and
        one the sum of z zᵀ (`with_gram`); the others start from zero.
        """
        for key in self._keys():
            if self.needs(key):
                setattr(self, key, state[key].to(getattr(self, key), copy=True))
        if self.is_held:
            self.deflation_basis = self.statistics_in(state).deflation_basis
        self.capture.clear()  # in place, because compiled graphs hold `gram` and `count`
        if with_gram:
            self.capture.set_gram(state["gram"])
        for key, own in self.running_sums().items():
            if with_tokens and key != "gram":
                own.copy_(state[key])
        for key in (*self.NUMBERS, "made_with"):
            setattr(self, key, state[key])
        every = self.settings.refresh_every
        # the saved run may have refreshed less often
        self.next_refresh = min(self.next_refresh, -(-self.step // every) * every)
        self.schedule_next()
