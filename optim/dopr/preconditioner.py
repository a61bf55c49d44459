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

from ..kernels.cholesky import Inverse
from ..kernels.dispatch import Backend, check_backend
from ..legacy_names import renamed_state
from ..process_group import Collective, ProcessGroup, everybody, n_processes
from .capture import install, remove
from .coverage import find_layers, uncovered_rows
from .distributed import gathered_state
from .hooks import (
    PreconditionedGrads,
    RegisteredParams,
    call_before_steps,
    check_optimizers,
    parameters,
)
from .layer import DoprSettings, InverseRoot, Layer, log, norms
from .refresh import inverse_roots, preconditioned, refresh, set_norm_ratios


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
        block_diagonal: largest width of a block of Σ. Wider inputs are cut into equal blocks. None
            uses a single block.
        embeddings: also cover nn.Embedding. Its Σ is diagonal and holds the frequency of every
            token t, so that row t of the gradient is divided by (frequency of t + γ̄)^(1/p), up to
            the scale of P. Exclude a table that the model also uses as a matrix (F.linear(h,
            wte.weight)): this second use is not detected.
        backend: "auto", "torch" or "triton", for Σ, Newton-Schulz and G P; see kernels/dispatch.py.
        include, exclude: names of the modules to cover or to skip; `*` and `?` are wildcards. A
            weight that is frozen now is never covered: construct a new preconditioner to train it.
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
            backend=backend,
        )
        covered, self._not_covered = find_layers(
            model, include=include, exclude=exclude, embeddings=embeddings
        )
        check_backend(backend, [each.weight for each in covered])
        self._shapes = {
            name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)
        }
        self._is_paused = torch.zeros((), dtype=torch.bool, device="cpu")  # read in the backward
        self.layers = [Layer(each, self.settings, self._is_paused) for each in covered]
        self._hooks: list[Any] = []
        self._collective = Collective()
        self._preconditioned_grads = PreconditionedGrads()
        for layer in self.layers:
            install(layer.covered.module, layer.capture)

    def attach(
        self, *optimizers: Optimizer, process_group: ProcessGroup | None = None
    ) -> ActivationPreconditioner:
        """Precondition before every step of these optimizers.

        Together, the optimizers must hold all covered weights, each of them once.

        Args:
            process_group: the processes that train the model together, each on a part of the batch
                (DDP, FSDP2). Defaults to a new group of all processes of torch.distributed. All of
                them must call this, after the weights were sharded.
        Raises:
            TypeError: if an argument is not a torch.optim.Optimizer, or has no step hooks.
            ValueError: if a covered weight is in no optimizer or in several, an optimizer is a
                wrapper (SAM, Lookahead) of the one to attach, the model was moved or cast, this
                preconditioner is attached already or was detached, the columns of a covered weight
                are sharded over processes, or the processes cover different layers.
        """
        self._check_not_detached()
        if self._hooks:
            raise ValueError("attached already: pass all optimizers to one call of attach()")
        check_optimizers(optimizers, self._weights())
        for layer in self.layers:
            layer.check_device_and_dtype()
            layer.covered.check_layout()
        self._collective = Collective(process_group) if process_group else everybody()
        shapes = {layer.name: tuple(layer.sigma.shape) for layer in self.layers}
        self._collective.check_same(f"{shapes}, {self.settings}", self.layers[0].sigma.device)
        for layer in self.layers:
            layer.capture.rank, layer.capture.size = self._collective.rank, self._collective.size
        self._registered_params = RegisteredParams(optimizers, self._weights())
        self._hooks = call_before_steps(optimizers, self._before_step)
        return self

    def detach(self) -> None:
        """Remove all hooks and captures from the optimizers and the model."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers:
            remove(layer.covered.module)
        self._hooks, self.layers = [], []

    def discard(self) -> None:
        """Drop all activations captured since the last refresh. Call it if you skip a step.

        With refresh_every > 1 these include the activations of earlier steps that were not skipped.
        """
        for layer in self.layers:
            layer.capture.clear()
            layer.schedule_next()
        self._preconditioned_grads.reset_counts()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep backward passes inside this context out of the statistics.

        Use it for a backward whose weight gradient is thrown away: gradients of inputs, the other
        player of a GAN, the first pass of SAM. Gradients are computed as usual and schedules go on.
        What counts is that backward() runs inside; the forward may be anywhere. This also holds for
        compiled code. `paused` may be nested. Second derivatives (create_graph, AdaHessian) and
        torch.func are not supported, paused or not.
        """
        before = self._is_paused.clone()
        self._is_paused.fill_(True)
        try:
            yield
        finally:
            self._is_paused.copy_(before)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that resuming needs, by layer. Save it beside the optimizer's state.

        All processes must call this together. All get the same state, which any number of processes
        can load.
        """
        self._check_not_detached()
        self._check_attached_to_group()
        return gathered_state(self.layers, self._collective)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `state_dict()`, to continue bit for bit. With several processes, attach first.

        If gamma, exponent or trace_normalized differ from the saved run, P is recomputed from the
        saved Σ. block_diagonal, embeddings, include and exclude may not differ where they change
        the covered layers or the shapes of Σ. All other settings may differ, and apply from now on.
        Nothing changes on error.

        Raises:
            ValueError: if layers, shapes or types differ or values are not finite (all are listed).
            FloatingPointError: if P must be recomputed and Σ has no inverse.
            RuntimeError: if there are several processes and `attach` was not called.
        """
        self._check_not_detached()
        self._check_attached_to_group()
        state = renamed_state(state)
        if problems := state_problems(state, self.layers):
            raise ValueError("preconditioner state does not fit: " + "; ".join(problems))
        recomputed = _outdated_inverse_roots(state, self.layers, self.settings, self._collective)
        for layer in self.layers:
            layer.load_state_dict(state[layer.name], with_sums=self._collective.rank == 0)
        for layer, new in recomputed:
            layer.set_inverse_root(new)

    def report(self, *, condition: bool = False) -> list[dict[str, Any]]:
        """Return one row for every weight of two or more dimensions.

        A row holds coverage and reason, memory, ‖M‖/‖G‖ and the number of fallbacks. With
        `condition`, also return the condition number of Σ + γ̄ I. This costs an eigendecomposition
        of each Σ.
        """
        covered = [layer.report(condition=condition) for layer in self.layers]
        return covered + uncovered_rows(self._not_covered, self._shapes)

    def summary(self) -> str:
        """Describe coverage and progress in one line, and each uncovered weight in another."""
        n_bytes = sum(layer.n_bytes for layer in self.layers)
        steps = _range(layer.step for layer in self.layers)
        refreshes = _range(layer.n_refreshes for layer in self.layers)
        warning = "" if self._hooks else "; not attached: no optimizer is preconditioned"
        return (
            f"DoPr covers {len(self.layers)} weights, {n_bytes / 2**20:.1f} MiB, "
            f"steps: {steps}, refreshes: {refreshes}{warning}"
        ) + "".join(
            f"\n  not covered: {name} ({reason})" for name, reason in self._not_covered.items()
        )

    def __reduce__(self) -> Any:
        raise TypeError(
            "a preconditioner belongs to its model and cannot be copied or pickled: construct a "
            "new one for the other model and load state_dict() into it"
        )

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer) -> None:
        """Replace G by M in every covered weight that this optimizer holds."""
        self._check_attached_to_group()
        self._registered_params.check(self._weights())
        held = parameters(optimizer)
        layers = [
            layer
            for layer in self.layers
            if layer.covered.weight in held
            and not self._preconditioned_grads.is_unchanged(layer.covered.grad, layer.capture.count)
        ]
        due = [layer for layer in layers if layer.is_due]
        refreshed = refresh(due, self.settings, self._collective)
        written, local_norms = [], {}
        for layer, grad, G, M in preconditioned(layers, self.settings.backend):
            if layer in refreshed:
                local_norms[layer] = norms(M, G)
            layer.covered.write(M, grad)
            written.append((grad, layer.capture.count))
        set_norm_ratios(local_norms, refreshed, self._collective)
        for layer in layers:
            layer.step += 1
            layer.schedule_next()
        self._preconditioned_grads.add(written)

    def _weights(self) -> dict[str, Tensor]:
        return {layer.label: layer.covered.weight for layer in self.layers}

    def _check_not_detached(self) -> None:
        if not self.layers:
            raise ValueError("this preconditioner was detached: construct a new preconditioner")

    def _check_attached_to_group(self) -> None:
        if self._collective.group is None and n_processes() > 1:
            raise RuntimeError(
                "torch.distributed was initialised after attach(), or attach() was not called, so "
                "every process would have its own statistics: call attach() after initialising it"
            )


# -- state

# Only states of inverse="newton_schulz" have it; if absent, the current basis is used.
OPTIONAL_KEYS = {"deflation_basis"}
# `gram` may be non-finite: the next refresh drops it.
FINITE_KEYS = ("sigma", "P", "damping", "deflation_basis")


def _outdated_inverse_roots(
    state: dict[str, Any], layers: list[Layer], settings: DoprSettings, collective: Collective
) -> list[tuple[Layer, InverseRoot]]:
    """Recompute every P of the state that was made with other settings, from the Σ of the state."""
    outdated = [
        layer
        for layer in layers
        if state[layer.name]["n_refreshes"]
        and state[layer.name]["made_with"] != settings.p_settings
    ]
    if outdated:
        log.info("recomputing P of %d layers, saved with other settings", len(outdated))
    return inverse_roots(
        outdated, lambda layer: layer.statistics_in(state[layer.name]), settings, collective
    )


def state_problems(state: Any, layers: Sequence[Layer]) -> list[str]:
    """List why the layers cannot load a state, {layer: {key: value}}."""
    if not isinstance(state, dict):
        return [f"it is a {type(state).__name__}, but must be a dict with an entry for every layer"]
    names = {layer.name for layer in layers}
    problems = [f"missing {name}" for name in sorted(names - state.keys())]
    problems += [f"unexpected {name}" for name in sorted(state.keys() - names, key=str)]
    for layer in layers:
        if layer.name in state:
            problems += _layer_problems(state[layer.name], layer)
    return problems


def _layer_problems(state: Any, layer: Layer) -> list[str]:
    """List why one layer cannot load its part of a state."""
    if not isinstance(state, dict):
        return [f"{layer.label} is a {type(state).__name__}, but must be a dict"]
    missing = {*layer.tensors(), *layer.NUMBERS, "made_with"} - state.keys() - OPTIONAL_KEYS
    if missing:
        return [f"{layer.label} has no {', '.join(sorted(missing))}"]
    problems = []
    for key, own in layer.tensors().items():
        value = state.get(key, own)
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        if shape is None:
            problems.append(f"{key} is a {type(value).__name__}, but must be a tensor")
        elif shape != tuple(own.shape):
            problems.append(f"{key} is {shape}, but must be {tuple(own.shape)}")
        elif key in FINITE_KEYS and not value.isfinite().all():
            problems.append(f"{key} is not finite")
    for key in layer.NUMBERS:
        if not isinstance(state[key], int) or state[key] < 0:
            problems.append(f"{key} is {state[key]!r}, but must be an integer >= 0")
    if not isinstance(state["made_with"], dict):
        problems.append(f"made_with is {state['made_with']!r}, but must be a dict")
    return [f"{layer.label}: {problem}" for problem in problems]


def _range(numbers: Iterable[int]) -> str:
    """Return `3` if all numbers are 3, else `0 to 3`."""
    distinct = sorted({*numbers} or {0})
    return f"{distinct[0]}" if len(distinct) == 1 else f"{distinct[0]} to {distinct[-1]}"
