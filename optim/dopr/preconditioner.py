"""DoPr: activation preconditioning, bound to any torch optimizer, just before its step.

    Σ = E[z zᵀ]                       of each layer's input z, over the tokens of the optimizer step
    γ̄ = γ tr(Σ)/d_in
    M = tr(Σ)/d_in · G (Σ + γ̄ I)⁻¹    replaces the gradient G; the optimizer does the rest

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
from ..process_group import Collective, ProcessGroup, everybody, n_processes
from .capture import install, remove
from .coverage import find_layers
from .distributed import Sums
from .hooks import (
    PreconditionedGrads,
    RegisteredParams,
    call_before_steps,
    check_optimizers,
    parameters,
)
from .layer import DoprSettings, InverseRoot, Layer, log, norms
from .refresh import preconditioned, preconditioners, refresh, set_norm_ratios


class ActivationPreconditioner:
    """Turns any torch optimizer into its DoPr version: M = G (Σ + γ̄ I)^(-1/p) before every step.

        preconditioner = ActivationPreconditioner(model, gamma=0.1, exclude=["lm_head"])
        preconditioner.attach(optimizer)

    Construct it after the model is on its device and before `torch.compile`. The order of a step is
    backward, clip (the raw gradient), then `optimizer.step()`, which preconditions first. A
    backward whose weight gradient is not wanted belongs inside `paused()`.

    The defaults are the paper's exact mode, up to the scale tr(Σ)/d_in of P (`trace_normalized`):
    the batch covariance of every step, over all tokens. Averaging (`sigma_beta`), sampling
    (`token_stride`, `collect_every`), rarer inverses (`refresh_every`) and blocks
    (`block_diagonal`) make it fast.

    Args:
        gamma: γ, damping relative to the mean eigenvalue of Σ; where a source writes it relative to
            the trace, γ = d_in · γ_trace. In fp32 the relative error of M is about 6e-8 times the
            condition number, at most 1 + d_in/γ: below 1e-4, train in float64.
        sigma_beta: β of an average of Σ over refreshes, bias-corrected; None: only the newest.
        refresh_every: steps between two P.
        collect_every: steps between two that add to Σ; divides `refresh_every`.
        token_stride: one token in so many adds to Σ, beginning elsewhere in each sequence and step;
            embeddings count every token, which costs next to nothing.
        exponent: p of (Σ + γ̄ I)^(-1/p): 1 (the paper), 2 or 4.
        inverse: cholesky (for p > 1 an eigendecomposition) or newton_schulz (for p = 1, deflated).
        trace_normalized: multiply P by the p-th root of the mean eigenvalue of Σ, so that M keeps
            the scale of G, and what is tuned to it (eps, clipping, width rules) keeps its meaning.
            False is the paper's P.
        block_diagonal: widest block of Σ; wider inputs are cut into equal blocks. None: no blocks.
        embeddings: also divide the rows of embeddings by (token frequency + γ̄). A table that is
            used functionally, too (F.linear(h, wte.weight)), is not detected: exclude it.
        kernel: auto, torch or triton, for Σ, Newton-Schulz and G P; see kernels/dispatch.py.
        include, exclude: names of modules, with `*` and `?`, to cover or to leave alone. A weight
            that is frozen now is never covered: make a new preconditioner when it is to train.
    Raises:
        TypeError: the model is not an nn.Module.
        ValueError: settings outside their range (all at once), nothing to cover, no such kernel.
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
        """Precondition before every step of these optimizers, which hold every covered weight.

        Args:
            process_group: the processes that train the model together, each on its part of the
                batch (DDP, FSDP2); None: all that torch.distributed knows, in a group of their own.
                All of them call this, after the weights were sharded.
        Raises:
            TypeError: not a torch.optim.Optimizer, or one without hooks.
            ValueError: a covered weight is in none of them or in several, one of them is a wrapper
                (SAM, Lookahead) of the optimizer to attach, the model was moved or cast meanwhile,
                this preconditioner is attached already or detached, the columns of a covered
                weight are spread over processes, or not all processes cover the same layers.
        """
        self._check_installed()
        if self._hooks:
            raise ValueError("attached already; pass all optimizers to one call of attach")
        check_optimizers(optimizers, self._weights())
        for layer in self.layers:
            layer.check_place()
            layer.covered.check_layout()
        self._collective = Collective(process_group) if process_group else everybody()
        self._collective.check_same(self._description(), self.layers[0].sigma.device)
        for layer in self.layers:
            layer.capture.rank, layer.capture.size = self._collective.rank, self._collective.size
        self._registered_params = RegisteredParams(optimizers, self._weights())
        self._hooks = call_before_steps(optimizers, self._precondition)
        return self

    def detach(self) -> None:
        """Leave the model and the optimizers as if this had never been there."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers:
            remove(layer.covered.module)
        self._hooks, self.layers = [], []

    def discard(self) -> None:
        """Forget the activations seen since the last refresh: for a step that is not taken."""
        for layer in self.layers:
            layer.capture.clear()
            layer.schedule_next()
        self._preconditioned_grads.nothing_captured()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, backward passes add nothing to the statistics; gradients are as ever.

        For a backward whose weight gradient is thrown away: gradients of inputs, a GAN's other
        player, the first pass of SAM. What counts is where the backward runs, eager or compiled;
        the forward may be anywhere. Schedules go on; `paused` may be nested. Second derivatives
        (create_graph, AdaHessian) and torch.func do not work, paused or not.
        """
        before = self._is_paused.clone()
        self._is_paused.fill_(True)
        try:
            yield
        finally:
            self._is_paused.copy_(before)

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs, by layer, as of now; keep it beside the optimizer's.

        Of several processes, all must call this, and all get the same: any number of processes can
        continue from it.
        """
        self._check_installed()
        self._check_processes()
        return state_of(self.layers, self._collective)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`, bit for bit; after `attach` if several processes do.

        A P that was made with another gamma, exponent or trace_normalized is made again here, from
        the Σ in `state`; all other settings may differ, too, and hold from now on.

        Raises:
            ValueError: other layers, shapes or kinds of values, values that are not finite, all
                listed.
            FloatingPointError: a P has to be made again, and Σ has no inverse.
            RuntimeError: several processes, before `attach`.
        Nothing was changed then.
        """
        self._check_installed()
        self._check_processes()
        if problems := state_problems(state, self.layers):
            raise ValueError("preconditioner state does not fit: " + "; ".join(problems))
        new_P = renewed(state, self.layers, self.settings, self._collective)
        for layer in self.layers:
            layer.load_state_dict(state[layer.name], with_sums=self._collective.rank == 0)
        for layer, new in new_P:
            layer.use(new)

    def report(self, *, condition: bool = False) -> list[dict[str, Any]]:
        """One row per weight: is it covered, or why not; memory, ‖M‖/‖G‖, what was mended.

        With `condition` also the condition number of Σ + γ̄ I, by an eigendecomposition of each Σ.
        """
        covered = [layer.report(condition=condition) for layer in self.layers]
        return covered + rows_of_the_rest(self._not_covered, self._shapes)

    def summary(self) -> str:
        """What is covered and what is not, for people; see `report` for every number."""
        return summary(self.layers, self._not_covered, is_attached=bool(self._hooks))

    def __reduce__(self) -> Any:
        raise TypeError(
            "a preconditioner belongs to its model and cannot be copied or pickled: make a new one "
            "for the other model and load state_dict() into it"
        )

    @torch.no_grad()
    def _precondition(self, optimizer: Optimizer) -> None:
        """Replace G by M in every covered weight that this optimizer holds."""
        self._check_processes()
        self._registered_params.check(self._weights())
        owned = parameters(optimizer)
        layers = [
            layer
            for layer in self.layers
            if layer.covered.weight in owned
            and not self._preconditioned_grads.is_done(layer.covered.grad, layer.capture.count)
        ]
        due = [layer for layer in layers if layer.is_due]
        refreshed = refresh(due, self.settings, self._collective)
        written, seen = [], {}
        for layer, grad, G, M in preconditioned(layers, self.settings.backend):
            if layer in refreshed:
                seen[layer] = norms(M, G)
            layer.covered.write(M, grad)
            written.append((grad, layer.capture.count))
        set_norm_ratios(seen, refreshed, self._collective)
        for layer in layers:
            layer.step += 1
            layer.schedule_next()
        self._preconditioned_grads.add(written)

    def _weights(self) -> dict[str, Tensor]:
        return {layer.label: layer.covered.weight for layer in self.layers}

    def _check_installed(self) -> None:
        if not self.layers:
            raise ValueError("this preconditioner was detached; make a new preconditioner")

    def _check_processes(self) -> None:
        if self._collective.group is None and n_processes() > 1:
            raise RuntimeError(
                "torch.distributed was initialised after attach, or there was no attach: every "
                "process would have statistics of its own; attach first"
            )

    def _description(self) -> str:
        """What must be the same in all processes."""
        shapes = {layer.name: tuple(layer.sigma.shape) for layer in self.layers}
        return f"{shapes}, {self.settings}"


OPTIONAL = {"deflation_basis"}  # a state of another `inverse` has none, and they are found again
# A running sum may be spoilt: it is dropped at the refresh.
FINITE = ("sigma", "P", "damping", "deflation_basis")


def state_of(layers: list[Layer], collective: Collective) -> dict[str, Any]:
    """{layer: {key: value}} with the running sums of all processes, in every process."""
    state = {layer.name: layer.state_dict() for layer in layers}
    if collective.size > 1:
        sums = Sums(layers, collective)
        sums.start(layers)
        for layer in layers:
            state[layer.name] |= {"gram": sums.gram(layer), "count": sums.count(layer)}
    return state


def renewed(
    state: dict[str, Any], layers: list[Layer], settings: DoprSettings, collective: Collective
) -> list[tuple[Layer, InverseRoot]]:
    """The layers whose P in `state` was made with other settings, with the P of ours."""
    outdated = [
        layer
        for layer in layers
        if state[layer.name]["n_refreshes"] and state[layer.name]["made_with"] != settings.of_P
    ]
    if outdated:
        log.info("%d P were made with other settings and are made again", len(outdated))
    return preconditioners(
        outdated, lambda layer: layer.statistics_in(state[layer.name]), settings, collective
    )


def state_problems(state: Any, layers: Sequence[Layer]) -> list[str]:
    """Why the layers cannot take this state, {layer: {key: value}}; empty if they can."""
    if not isinstance(state, dict):
        return [f"it is {type(state).__name__}, wanted a dict with an entry for every layer"]
    names = {layer.name for layer in layers}
    problems = [f"missing {name}" for name in sorted(names - state.keys())]
    problems += [f"unexpected {name}" for name in sorted(state.keys() - names, key=str)]
    for layer in layers:
        problems += layer_problems(state[layer.name], layer) if layer.name in state else []
    return problems


def layer_problems(state: Any, layer: Layer) -> list[str]:
    """Why one layer cannot take this state."""
    name = layer.label
    if not isinstance(state, dict):
        return [f"{name} is {type(state).__name__}, wanted a dict"]
    missing = {*layer.tensors(), *layer.NUMBERS, "made_with"} - state.keys() - OPTIONAL
    if missing:
        return [f"{name} has no {', '.join(sorted(missing))}"]
    wrong = [
        f"{name}: {_tensor_problem(key, state[key], own)}"
        for key, own in layer.tensors().items()
        if key in state and _tensor_problem(key, state[key], own)
    ]
    wrong += [
        f"{name}: {key} is {state[key]!r}, wanted a whole number, at least 0"
        for key in layer.NUMBERS
        if not isinstance(state[key], int) or state[key] < 0
    ]
    if not isinstance(state["made_with"], dict):
        wrong.append(f"{name}: made_with is {state['made_with']!r}, wanted a dict")
    return wrong


def _tensor_problem(key: str, value: Any, own: Tensor) -> str:
    """What is wrong with one tensor of a state; empty if nothing is."""
    shape = tuple(value.shape) if isinstance(value, Tensor) else None
    if shape != tuple(own.shape):
        return f"{key} is {shape}, wanted {tuple(own.shape)}"
    return f"{key} is not finite" if key in FINITE and not value.isfinite().all() else ""


def rows_of_the_rest(
    reasons: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> list[dict[str, Any]]:
    """A row like `Layer.report`'s for every weight that is not covered, with its reason."""
    blank = {"covered": False, "bytes": 0, "condition": None, "norm_ratio": None, "fallbacks": 0}
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
