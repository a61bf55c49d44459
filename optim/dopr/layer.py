"""What is known of each covered layer's inputs, Σ, and the P that follows from it."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from ..kernels.cholesky import Inverse
from ..kernels.deflation import first_deflation_basis
from ..kernels.dispatch import BACKENDS, Backend
from ..kernels.newton_schulz import full_precision
from .capture import Capture
from .coverage import Covered


def n_blocks(d: int, widest: int | None) -> int:
    """The smallest number of equal blocks of at most `widest` that d divides into."""
    if widest is None:
        return 1
    return next(blocks for blocks in range(-(-d // widest), d + 1) if d % blocks == 0)


def ema_update(sigma: Tensor, batch: Tensor, beta: float | None, n_updates: int) -> Tensor:
    """The mean Σ after one more batch covariance; bias-corrected, so it is right from the first.

    Σ <- Σ + (1-β) / (1-βⁿ) (Σ_batch - Σ), n counting this update. β = None keeps only the batch.
    """
    if beta is None or n_updates == 1:
        return batch
    return sigma + (1 - beta) / (1 - beta**n_updates) * (batch - sigma)


def mean_eigenvalue(sigma: Tensor) -> Tensor:  # (..., blocks, b, b) -> (...); (d,) -> ()
    """tr(Σ) / d_in over all blocks."""
    if sigma.dim() == 1:
        return sigma.mean()
    return sigma.diagonal(dim1=-2, dim2=-1).mean(dim=(-2, -1))


def condition_bound(d: int, gamma: float) -> float:
    """d/γ = tr(Σ) / γ̄ over all blocks, of d features together; one block may hold it all."""
    return d / gamma if gamma else math.inf


def diagonal_inverse_root(sigma: Tensor, damping: Tensor, p: int) -> Tensor:
    """(σ + γ̄)^(-1/p) of a diagonal covariance (d_in,)."""
    return (sigma + damping) ** (-1 / p)


def precondition(G: Tensor, P: Tensor) -> Tensor:
    """M = G P for G (d_out, d_in), computed at least in fp32 whatever the matmul settings outside.

    Args:
        P: (blocks, b, b), or (d_in,) for a diagonal.
    Source: Zhang et al., arXiv 2606.06418 (activation preconditioning).
    """
    G = G.to(P.dtype)
    if P.dim() == 1:
        return G * P
    blocks, b, _ = P.shape
    with full_precision(G.device.type):
        if blocks == 1:
            return G @ P[0]
        stacked = G.view(-1, blocks, b).transpose(0, 1)  # (blocks, d_out, b)
        return torch.bmm(stacked, P).transpose(0, 1).reshape(G.shape)


def norms(M: Tensor, G: Tensor) -> Tensor:  # (2,)
    """‖M‖ and ‖G‖."""
    return torch.stack([torch.linalg.vector_norm(M), torch.linalg.vector_norm(G, dtype=M.dtype)])


def norm_ratio(norms: Tensor) -> Tensor:  # ()
    """‖M‖ / ‖G‖; 0 where G is zero."""
    return norms[0] / norms[1].clamp_min(torch.finfo(norms.dtype).tiny)


def condition_number(sigma: Tensor, damping: Tensor) -> float:
    """λmax / λmin of Σ + γ̄ I over all blocks; costs an eigendecomposition.

    Args:
        damping: γ̄, one of every block (blocks,), or one of all, () or (1,).
    """
    values = sigma if sigma.dim() == 1 else torch.linalg.eigvalsh(sigma.double())
    values = values.double() + damping.double()[..., None]  # (blocks, b)
    return float(values.max() / values.min().clamp_min(0))


INVERSES = get_args(Inverse)
log = logging.getLogger("dopr")


@dataclass(frozen=True, kw_only=True)
class DoprSettings:
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
    backend: Backend

    def __post_init__(self) -> None:
        problems = settings_problems(vars(self))
        if problems:
            raise ValueError("\n".join(problems))
        for key, value in vars(self).items():
            object.__setattr__(self, key, _plain(value))

    @property
    def of_P(self) -> dict[str, Any]:
        """What P depends on besides Σ; a P that was made with other values must be made again."""
        return {key: getattr(self, key) for key in ("gamma", "exponent", "trace_normalized")}


def settings_problems(settings: dict[str, Any]) -> list[str]:
    """Everything that is wrong with these settings, one line each."""
    wanted = {key: text for key, (is_good, text) in _WANTED.items() if not is_good(settings[key])}
    problems = [f"{key}={_shown(settings[key])}: must be {text}" for key, text in wanted.items()]
    if not {"refresh_every", "collect_every"} & wanted.keys():
        collect_every, refresh_every = settings["collect_every"], settings["refresh_every"]
        if refresh_every % collect_every:
            problems.append(
                f"collect_every={collect_every}: must divide refresh_every={refresh_every}, "
                "so that a refresh has fresh statistics"
            )
    if settings["embeddings"] is True and settings["gamma"] == 0:
        problems.append("gamma=0 with embeddings: tokens that do not occur need a gamma above 0")
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _plain(value: Any) -> Any:
    """A number of numpy, say, as Python's own, which every checkpoint can hold."""
    if not _is_number(value):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _shown(value: Any) -> str:
    """The value, with its type if it is no number."""
    return f"{value}" if _is_number(value) else f"{value!r} ({type(value).__name__})"


_COUNT = (_is_count, "a whole number, at least 1")
_WANTED = {  # key: what makes a good value, in code and in words
    "gamma": (
        lambda value: _is_number(value) and 0 <= value < float("inf"),
        "a number, finite and at least 0",
    ),
    "sigma_beta": (
        lambda value: value is None or (_is_number(value) and 0 <= value < 1),
        "a number in [0, 1), or None for no average",
    ),
    **dict.fromkeys(("refresh_every", "collect_every", "token_stride"), _COUNT),
    "exponent": (lambda value: _is_count(value) and value in (1, 2, 4), "1, 2 or 4"),
    "inverse": (lambda value: value in INVERSES, f"one of {', '.join(INVERSES)}"),
    "block_diagonal": (
        lambda value: value is None or _is_count(value),
        "a whole number, at least 1, or None for no blocks",
    ),
    **dict.fromkeys(
        ("trace_normalized", "embeddings"),
        (lambda value: isinstance(value, bool), "True or False"),
    ),
    "backend": (lambda value: value in BACKENDS, f"one of {', '.join(BACKENDS)}"),
}


class InverseRoot(NamedTuple):
    """P = (Σ + γ̄ I)^(-1/p) of one layer, trace-normalised or not, and how it came about."""

    P: Tensor  # (blocks, b, b), or (d,) for a diagonal
    damping: Tensor  # (blocks,) γ̄, which differs where a block had to be damped more
    deflation_basis: Tensor | None  # (blocks, b, k), U of kernels/deflation.py
    n_failed: int  # inverses that failed on the way
    is_damped_more: bool  # whether more than γ asks for


class Layer:
    """One covered layer: what its inputs were like, and the P made from that."""

    TENSORS = ("sigma", "P", "damping", "norm_ratio")
    NUMBERS = ("step", "next_refresh", "n_refreshes", "n_fallbacks")

    def __init__(self, covered: Covered, settings: DoprSettings, is_paused: Tensor) -> None:
        self.covered = covered
        self.name = covered.name
        self.label = covered.name or type(covered.module).__name__  # of a model that is one layer
        self.settings = settings
        d = covered.d_in
        blocks = 1 if covered.is_diagonal else n_blocks(d, settings.block_diagonal)
        shape = (d,) if covered.is_diagonal else (blocks, d // blocks, d // blocks)
        self.capture = Capture(
            shape, covered.weight, settings.token_stride, is_paused, settings.backend
        )
        self.sigma = torch.zeros_like(self.capture.gram)  # Σ
        self.P = torch.zeros_like(self.capture.gram)  # (Σ + γ̄ I)^(-1/p), trace-normalised
        self.damping = self.sigma.new_zeros(blocks)  # γ̄ of each block
        self.deflation_basis = None  # U, (blocks, b, k), carried from one inverse to the next
        if settings.inverse == "newton_schulz" and not covered.is_diagonal:
            self.deflation_basis = first_deflation_basis(self.sigma, settings.exponent)
        self.norm_ratio = self.sigma.new_ones(())  # ‖M‖ / ‖G‖ at the last refresh
        self.step = 0  # steps of the optimizer that owns the weight
        self.next_refresh = 0  # the step from which on new statistics are due
        self.n_refreshes = 0  # 0: there is no P yet
        self.n_fallbacks = 0  # times that an inverse or an unusable sum had to be mended
        self.made_with = settings.of_P  # what P was made with

    @property
    def is_due(self) -> bool:
        return self.step >= self.next_refresh

    @property
    def following_refresh(self) -> int:
        """The first step of the schedule after this one."""
        every = self.settings.refresh_every
        return (self.step // every + 1) * every

    def schedule_next(self) -> None:
        """Whether, and from which offset, the coming step adds to the statistics."""
        on_schedule = self.step % self.settings.collect_every == 0
        self.capture.is_collecting = on_schedule or self.is_due
        self.capture.offset.fill_(self.step // self.settings.collect_every)

    def next_sigma(self, gram: Tensor, count: Tensor) -> Tensor:
        """Σ with what all processes captured since the last refresh."""
        batch = gram / count
        return ema_update(self.sigma, batch, self.settings.sigma_beta, self.n_refreshes + 1)

    def use(self, new: InverseRoot) -> None:
        """Take `new` from now on; inverses that failed on the way are counted and logged."""
        self.P, self.damping, self.deflation_basis = new.P, new.damping, new.deflation_basis
        self.made_with = self.settings.of_P
        if new.n_failed:
            is_iterative = self.settings.inverse == "newton_schulz"
            what = "Newton-Schulz failed, redone by Cholesky" if is_iterative else "Cholesky failed"
            more = f"; damping is now {new.damping.max():.1e}" if new.is_damped_more else ""
            self.fallbacks(what + more)

    def fallbacks(self, what: str) -> None:
        """Something went wrong and was mended: counted, and logged the 1st, 2nd, 4th, 8th time."""
        self.n_fallbacks += 1
        if self.n_fallbacks.bit_count() == 1:
            log.warning("%s: %s (mended so far: %d)", self.label, what, self.n_fallbacks)

    def check_place(self) -> None:
        """Raise ValueError if the weight was moved or cast since these statistics were made."""
        weight, sigma = self.covered.weight, self.sigma
        wanted = torch.promote_types(weight.dtype, torch.float32)
        if (sigma.device, sigma.dtype) != (weight.device, wanted):
            raise ValueError(
                f"{self.label}.weight is {weight.dtype} on {weight.device}, its statistics are "
                f"{sigma.dtype} on {sigma.device}: construct the preconditioner after the model is "
                "on its device and in its dtype"
            )

    def tensors(self) -> dict[str, Tensor]:
        own = {key: getattr(self, key) for key in self.TENSORS}
        U = {} if self.deflation_basis is None else {"deflation_basis": self.deflation_basis}
        return own | U | {"gram": self.capture.gram, "count": self.capture.count}

    def statistics_in(self, state: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Σ and U of a state; our own U if it was saved without, under another `inverse`."""
        U = self.deflation_basis
        U = U if U is None else state.get("deflation_basis", U).to(U, copy=True)
        return state["sigma"].to(self.sigma), U

    def state_dict(self) -> dict[str, Any]:
        numbers = {key: getattr(self, key) for key in (*self.NUMBERS, "made_with")}
        running = {"gram": self.capture.gram.clone(), "count": self.capture.count.clone()}
        return self.tensors() | running | numbers

    def load_state_dict(self, state: dict[str, Any], *, with_sums: bool = True) -> None:
        """Take a state without `optim.dopr.preconditioner.state_problems`; earlier states are left alone.

        Of several processes one takes the sums, the others begin new ones.
        """
        for key in self.TENSORS:
            setattr(self, key, state[key].to(getattr(self, key), copy=True))
        self.deflation_basis = self.statistics_in(state)[1]
        self.capture.clear()  # in place: compiled graphs hold these two
        if with_sums:
            self.capture.gram.copy_(state["gram"])
            self.capture.count.copy_(state["count"])
        for key in (*self.NUMBERS, "made_with"):
            setattr(self, key, state[key])
        every = self.settings.refresh_every
        self.next_refresh = min(self.next_refresh, -(-self.step // every) * every)  # if rarer there
        self.schedule_next()

    @property
    def n_bytes(self) -> int:
        """Memory of Σ, its running sum, P and U."""
        return 3 * self.sigma.nbytes + (
            0 if self.deflation_basis is None else self.deflation_basis.nbytes
        )

    def report(self, *, condition: bool) -> dict[str, Any]:
        """What is worth knowing; the condition number costs an eigendecomposition."""
        is_ready = self.n_refreshes > 0
        kappa = condition_number(self.sigma, self.damping) if condition and is_ready else None
        return {
            "name": f"{self.name}.weight",
            "shape": tuple(self.covered.weight.shape),
            "covered": True,
            "reason": "",
            "bytes": self.n_bytes,
            "condition": kappa,
            "norm_ratio": self.norm_ratio.item() if is_ready else None,
            "fallbacks": self.n_fallbacks,
        }
