"""DoPr: activation preconditioning for any torch optimizer, applied just before its step.

    Σ = E[z zᵀ]                                of each layer's input z, over the tokens since the
                                               last refresh
    γ̄ = γ tr(Σ)/d_in
    P = (tr(Σ)/d_in)^(1/p) (Σ + γ̄ I)^(-1/p)    p = 1 by default; the first factor only if
                                               `trace_normalized`, the default
    M = G P                                    replaces the gradient G in the optimizer's update

Source: Zhang, Shah, Zhang, Zhang, Matni, Simchowitz, "Double Preconditioning", arXiv 2606.06418.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..kernels.damped_root import Inverse
from ..kernels.dispatch import Backend, check_backend
from ..process_group import (
    Collective,
    ProcessGroup,
    everybody,
    is_sharded,
    n_processes,
)
from .census import Census
from .coverage import Selection, find_layers
from .distributed import Sums
from .exchange import Exchange
from .forwards import install, reinstall, remove
from .grads import FormedGrads, PreconditionedGrads
from .hooks import OtherSteps, RegisteredParams, call_around_steps
from .layer import Layer
from .mean import clear_step_sums, update_means
from .optimizers import REATTACH, check_optimizers, parameters, unwrapped
from .ownership import Processes, check_group, share, share_tokens, shares_statistics
from .reduction import Reduction
from .refresh import preconditioned, refresh, set_norm_ratios
from .settings import DoprSettings, Sharing
from .state import Gather, gathered_state, load_state
from .statistics import norms
from .usable import with_gradient


class ActivationPreconditioner:
    """Precondition the gradients of any torch optimizer: replace G by M = G P before every step.

        preconditioner = ActivationPreconditioner(model, gamma=0.1, exclude=["lm_head"])
        preconditioner.attach(optimizer)

    Construct it after `.to(device, dtype)`, with FSDP2 after `fully_shard`, and before
    `torch.compile`. A step consists of backward, clipping of the raw gradient, and
    `optimizer.step()`, which preconditions first. Run a backward whose weight gradient is thrown
    away inside `paused()`.

    The defaults are the exact mode of the paper, up to the scale tr(Σ)/d_in of P
    (`trace_normalized`): every step uses its own batch covariance over all tokens. To save time,
    average Σ (`sigma_beta`), sample tokens (`token_stride`, `collect_every`), compute inverses less
    often (`refresh_every`), or cut Σ into blocks (`block_diagonal`).

    Args:
        gamma: γ, the damping relative to the mean eigenvalue of Σ. If a source gives it relative to
            the trace, γ = d_in · γ_trace. In fp32 the relative error of M is about 6e-8 times the
            condition number, which is at most 1 + d_in/γ. For γ below 1e-4, use weights in float64.
        sigma_beta: β of a bias-corrected moving average of Σ over refreshes. None uses only the
            newest Σ.
        refresh_every: number of steps between two computations of P.
        collect_every: number of steps between two steps that add to Σ; must divide `refresh_every`.
        token_stride: adds one token in `token_stride` to Σ, with an offset that changes from
            sequence to sequence and from step to step. Embeddings always count every token.
        exponent: p of (Σ + γ̄ I)^(-1/p): 1 (the paper), 2 or 4.
        inverse: "cholesky" (an eigendecomposition for p > 1) or "newton_schulz" (deflated for p = 1
            and blocks of Σ of width >= 128).
        trace_normalized: multiply P by the p-th root of the mean eigenvalue of Σ. M then keeps the
            scale of G, so that eps and width rules stay valid. False gives the P of the paper.
        block_diagonal: largest width of a block of Σ. Wider inputs are cut into equal blocks, whose
            width divides that of the input. None uses a single block.
        embeddings: also cover nn.Embedding. Its Σ is diagonal and holds the frequency of every
            token t, so that row t of the gradient is divided by (frequency of t + γ̄)^(1/p), up to
            the scale of P. Exclude a table that the model also uses as a matrix (F.linear(h,
            wte.weight)): this second use is not detected.
        fresh_mean: with refresh_every > 1, use the mean of z of the current step in every step, and
            only the centred covariance of the last refresh (optim/dopr/mean.py). Needs exponent 1.
            The mean samples tokens like Σ, but in every step.
        count_masked: also count tokens whose output gradient is exactly zero, such as padding and
            masked prompts. They add nothing to G, and by default nothing to Σ.
        statistics: which processes hold Σ, its sum and P: "replicated", all of them; "sharded", one
            process per layer, which gets the rows of G and returns those of M; "auto", sharded if
            the weights are (FSDP2, HSDP), else replicated. Sharded statistics need the same
            backward passes in the same order in all processes, as FSDP2 does.
        backend: "auto", "torch" or "triton", for Σ, Newton-Schulz and G P; see kernels/dispatch.py.
        include, exclude: names of the modules to cover or to skip, or of their weights, as
            `report()` prints them; `*` and `?` are wildcards. A weight that is frozen now is never
            covered: construct a new preconditioner to train it.
    Raises:
        TypeError: if the model is not an nn.Module.
        ValueError: if settings are out of range (all are listed), no layer can be covered, or the
            backend cannot run.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        gamma: float,
        sigma_beta: float | None = None,
        refresh_every: int = 1,
        collect_every: int = 1,
        token_stride: int = 1,
        exponent: int = 1,
        inverse: Inverse = "cholesky",
        trace_normalized: bool = True,
        block_diagonal: int | None = None,
        embeddings: bool = False,
        fresh_mean: bool = False,
        count_masked: bool = False,
        statistics: Sharing = "auto",
        backend: Backend = "auto",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> None:
        self.settings = DoprSettings(
            gamma=gamma,
            sigma_beta=sigma_beta,
            refresh_every=refresh_every,
            collect_every=collect_every,
            token_stride=token_stride,
            exponent=exponent,
            inverse=inverse,
            trace_normalized=trace_normalized,
            block_diagonal=block_diagonal,
            embeddings=embeddings,
            fresh_mean=fresh_mean,
            count_masked=count_masked,
            statistics=statistics,
            backend=backend,
        )
        selection = Selection(include, exclude, embeddings)
        covered, _ = find_layers(model, selection)
        check_backend(backend, [each.weight for each in covered])
        self._is_paused = torch.zeros((), dtype=torch.bool, device="cpu")  # read in the backward
        is_held = not shares_statistics(statistics, covered)  # attach() decides in the end
        self.layers = [
            Layer(each, self.settings, self._is_paused, is_held=is_held) for each in covered
        ]
        self._hooks: list[Any] = []
        self._sums_before_step: list[tuple[Tensor, ...]] = []
        self._processes = Processes.of(Collective())
        self._exchange = Exchange((), self._processes.shards)
        self._reduction = Reduction(self._processes.shards)
        self._preconditioned_grads = PreconditionedGrads()
        self._formed_grads = FormedGrads(self._is_paused)
        self._census = Census(model, selection, self.layers)
        for layer in self.layers:
            install(layer.covered.module, layer.capture)
        self._census.warn_below_half()
        self._census.warn_of_narrow_blocks(block_diagonal)

    def attach(
        self, *optimizers: Any, process_group: ProcessGroup | None = None
    ) -> ActivationPreconditioner:
        """Precondition before every step of these optimizers.

        Together, the optimizers must hold all covered weights, each of them once. If
        torch.distributed is initialized after attach(), call it again. This drops the tokens seen
        so far if the statistics are then sharded. A first attach() that raises leaves the model as
        it was before construction, and can be repeated.

        Args:
            optimizers: torch optimizers, lists or containers of them, or the wrappers of accelerate
                and Lightning.
            process_group: the processes that train these layers together: on different parts of the
                batch (DDP, FSDP2), or on different parts of the layers (tensor parallelism).
                Defaults to a group of all processes of torch.distributed, one for all
                preconditioners. All of them must call this, after the weights were sharded.
        Raises:
            TypeError: if an argument is not a torch.optim.Optimizer, or has no step hooks.
            ValueError: if a covered weight is in no optimizer or in several, an optimizer is a
                wrapper (SAM, Lookahead) of the one to attach, the model was moved or cast, this
                preconditioner is attached already or was detached, a covered weight is sharded in a
                way that is not supported or over processes outside the group, the processes cover
                different layers, or statistics are to be sharded but the weights are not all
                sharded by rows in the same way.
            RuntimeError: if covered layers were replaced, tied, frozen or reparametrized after
                construction.
        """
        self._check_not_detached()
        if self._hooks and not self._misses_processes:
            raise ValueError(f"attached already: to attach other optimizers, {REATTACH}")
        was_attached = bool(self._hooks)
        for layer in self.layers:
            reinstall(layer.covered.module, layer.capture)
        try:
            plain = [each for given in optimizers for each in unwrapped(given)]
            self._attach(plain, process_group)
        except Exception:
            if not was_attached:
                self._remove_captures()
            raise
        return self

    def _attach(self, plain: Sequence[Any], process_group: ProcessGroup | None) -> None:
        self._census.check_before_attaching()
        check_optimizers(plain, self._weights())
        for layer in self.layers:
            layer.check_device_and_dtype()
            layer.covered.column_mesh_dim()  # checks the layout
        together = Collective(process_group) if process_group else everybody()
        check_group(together, [layer.covered for layer in self.layers])
        shapes = {layer.name: layer.shape for layer in self.layers}
        together.check_same(f"{shapes}, {self.settings}", self.layers[0].sigma.device)
        self._processes = share(self.layers, together, self.settings.statistics)
        self._exchange = Exchange(self.layers, self._processes.shards)
        self._reduction = Reduction(self._processes.shards)
        for layer in self.layers:
            layer.capture.rank, layer.capture.size = together.rank, together.size
            layer.capture.reduce_by(self._reduction, layer.owner)
            layer.schedule_next()
        share_tokens(self.layers)
        self._remove_hooks()
        self._registered_params = RegisteredParams(plain, self._weights())
        self._other_steps = OtherSteps(plain, self._formed_grads)
        self._hooks = [
            *call_around_steps(plain, self._before_step, self._after_step),
            *map(self._formed_grads.watch, self.layers),
            self._other_steps.watch(),
        ]

    def detach(self) -> None:
        """Remove all hooks and captures from the optimizers and the model."""
        self._remove_hooks()
        self._remove_captures()
        self._formed_grads.clear(self.layers)
        self._census.forget()
        self.layers = []

    def _remove_captures(self) -> None:
        for layer in self.layers:
            remove(layer.covered.module, layer.capture)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def discard(self) -> None:
        """Drop all activations captured since the last refresh. Call it if you skip a step.

        With refresh_every > 1 these include the activations of earlier steps that were not skipped.
        """
        self._sums_before_step = []
        for layer in self.layers:
            layer.capture.clear()
            layer.schedule_next()
        self._preconditioned_grads.reset_counts()
        self._formed_grads.clear(self.layers)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep backward passes inside this context out of the statistics.

        Use it for a backward whose weight gradient is thrown away: gradients of inputs, the other
        player of a GAN, the first pass of SAM. Gradients are computed as usual and schedules go on.
        Only the backward has to run inside; the forward may run outside. This also holds for
        compiled code. `paused` may be nested. torch.func is not supported, paused or not.
        """
        before = self._is_paused.clone()
        self._is_paused.fill_(True)
        try:
            yield
        finally:
            self._is_paused.copy_(before)

    def state_dict(self, *, gather: Gather = "all") -> dict[str, Any]:
        """Return everything that resuming needs, by layer. Save it beside the optimizer's state.

        All processes must call this together. The state does not depend on their number, and any
        number of processes can load it.

        Args:
            gather: which processes get statistics that only one process holds, as tensors on the
                CPU: "all" of them, the "first" of the group, or "none", which leaves them where
                they are. Tensors that a process does not get are on the meta device; leave them out
                for torch.distributed.checkpoint.
        Raises:
            ValueError: if `gather` is none of the three.
            RuntimeError: if there are several processes and `attach` was not called.
        """
        self._check_not_detached()
        self._check_attached_to_group()
        return gathered_state(self.layers, self._processes, gather)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `state_dict()`, to continue bit for bit. With several processes, attach first.

        If gamma, exponent or trace_normalized differ from the saved run, P is recomputed from the
        saved Σ. fresh_mean may not differ. block_diagonal, embeddings, include and exclude may not
        differ where they change the covered layers or the shapes of Σ. All other settings may
        differ, and apply from now on. Nothing changes on error. A process needs only the statistics
        that it holds; the others may be on the meta device, or absent.

        Raises:
            ValueError: if layers, shapes or types differ, values are not finite, or counts are
                negative or fractional (all are listed).
            FloatingPointError: if P must be recomputed and Σ has no inverse.
            RuntimeError: if there are several processes and `attach` was not called.
        """
        self._check_not_detached()
        self._check_attached_to_group()
        load_state(state, self.layers, self.settings, self._processes)
        self._preconditioned_grads.reset_counts()
        self._formed_grads.clear(self.layers)

    def report(self, *, condition: bool = False) -> list[dict[str, Any]]:
        """Return one row for every weight of two or more dimensions of the model as it is.

        A row holds coverage and reason, the width of the blocks of Σ, memory, ‖M‖/‖G‖ and the
        number of fallbacks. With `condition`, also return the condition number of Σ + γ̄ I. This
        costs an eigendecomposition of each Σ. After detach(), no weight is covered.
        """
        return self._census.rows(condition=condition)

    def summary(self) -> str:
        """Describe coverage and progress in one line, and each uncovered weight in another."""
        n_bytes = sum(layer.n_bytes for layer in self.layers)
        steps = _range(layer.step for layer in self.layers)
        refreshes = _range(layer.n_refreshes for layer in self.layers)
        warning = "" if self._hooks else "; not attached: no optimizer is preconditioned"
        covered, reasons = self._census.now()
        return (
            f"DoPr covers {len(covered)} weights ({self._census.share():.0%} of the parameters), "
            f"{n_bytes / 2**20:.1f} MiB, steps: {steps}, refreshes: {refreshes}{warning}"
        ) + "".join(f"\n  not covered: {name} ({reason})" for name, reason in reasons.items())

    def __repr__(self) -> str:
        return self.summary() if self.layers else "DoPr, detached"

    def __reduce__(self) -> Any:
        raise TypeError(
            "a preconditioner belongs to its model and cannot be copied or pickled: construct a "
            "new one for the other model and load state_dict() into it"
        )

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer) -> None:
        """Replace G by M in every covered weight that this optimizer holds."""
        self._sums_before_step = []  # of a step that raised
        if getattr(optimizer, "found_inf", False):  # by GradScaler: a fused step changes nothing
            return
        self._check_attached_to_group()
        self._registered_params.check(self._weights())
        held = parameters(optimizer)
        layers = [
            layer
            for layer in self.layers
            if layer.covered.weight in held and not self._is_preconditioned(layer)
        ]
        if due := [layer for layer in layers if layer.is_due]:
            self._census.check(layers)
        for layer in due:
            layer.check_device_and_dtype()
        self._reduction.finish()
        sums = Sums(due, self._processes, was_formed=self._formed_grads.any(layers))
        if self._is_empty_step(layers, sums):
            return
        gram_means = update_means(layers, due, self._processes.everybody)
        refreshed = refresh(due, sums, gram_means, self.settings, self._processes)
        written, local_norms = [], {}
        for layer, grad, G, M in preconditioned(layers, self.settings.backend, self._exchange):
            if layer in refreshed:
                local_norms[layer] = norms(M, G)
            layer.covered.write(M, grad)
            written.append((layer.covered.weight.grad, layer.capture.count))
        set_norm_ratios(local_norms, refreshed, self._processes.everybody)
        clear_step_sums(layers)
        for layer in layers:
            layer.step += 1
            layer.schedule_next()
        self._preconditioned_grads.add(written)
        self._formed_grads.clear(layers)
        if any(grad.requires_grad for grad, _ in written):  # the step may differentiate them again
            self._sums_before_step = [layer.capture.sums() for layer in self.layers]

    def _is_preconditioned(self, layer: Layer) -> bool:
        """Return whether the gradient is still the M of an earlier step, alike in all processes."""
        grad, count = layer.covered.weight.grad, layer.capture.count
        was_formed = self._formed_grads.any([layer])
        return not was_formed and self._preconditioned_grads.is_unchanged(grad, count)

    def _is_empty_step(self, layers: list[Layer], sums: Sums) -> bool:
        """Return whether no backward preceded this step and all gradients are zero.

        torch.distributed.checkpoint takes such a step to create the optimizer's state. If no layer
        is due, every process decides alone whether a backward ran: with sharded weights, it ran in
        all of them or in none. Whole gradients are alike in all processes, but rows are not.
        """
        if sums.was_formed:
            return False
        has_rows = any(is_sharded(layer.covered.weight) for layer in layers)
        group = self._processes.everybody if sums.is_shared or has_rows else Collective()
        return not with_gradient(layers, group)

    def _after_step(self) -> None:
        """Drop what the step itself captured when it differentiated the gradients again."""
        for layer, sums in zip(self.layers, self._sums_before_step, strict=False):
            layer.capture.set_sums(sums)
        self._sums_before_step = []

    def _weights(self) -> dict[str, Tensor]:
        return {layer.label: layer.covered.weight for layer in self.layers}

    def _check_not_detached(self) -> None:
        if not self.layers:
            raise ValueError("this preconditioner was detached: construct a new preconditioner")

    @property
    def _misses_processes(self) -> bool:
        """Whether there are several processes, but `attach` knew of one only."""
        return self._processes.everybody.group is None and n_processes() > 1

    def _check_attached_to_group(self) -> None:
        if self._misses_processes:
            raise RuntimeError(
                "torch.distributed was initialised after attach(), or attach() was not called, so "
                "every process would have its own statistics: call attach() after initialising it"
            )


def _range(numbers: Iterable[int]) -> str:
    """Return `3` if all numbers are 3, else `0 to 3`."""
    distinct = sorted({*numbers} or {0})
    return f"{distinct[0]}" if len(distinct) == 1 else f"{distinct[0]} to {distinct[-1]}"
