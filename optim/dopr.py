"""DoPr: activation preconditioning, bound to any torch optimizer, just before its step.

    Σ = E[z zᵀ]                       of each layer's input z, over the tokens of the optimizer step
    γ̄ = γ tr(Σ)/d_in
    M = tr(Σ)/d_in · G (Σ + γ̄ I)⁻¹    replaces the gradient G; the optimizer does the rest

Source: Zhang, Shah, Zhang, Zhang, Matni, Simchowitz, "Double Preconditioning", arXiv 2606.06418.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from kernels.cholesky import Inverse
from optim.capture import install, remove
from optim.covariance import norm_ratio, precondition
from optim.coverage import find_layers
from optim.statistics import Layer, Settings, refresh


class ActivationPreconditioner:
    """Turns any torch optimizer into its DoPr version: M = G (Σ + γ̄ I)^(-1/p) before every step.

        preconditioner = ActivationPreconditioner(model, gamma=0.1, exclude=["lm_head"])
        preconditioner.attach(optimizer)

    Construct it after the model is on its device and before `torch.compile`. The order of a step is
    backward, clip (the raw gradient), then `optimizer.step()`, which preconditions first.

    The defaults are the paper's exact mode: the batch covariance of every step, over all tokens.
    Averaging (`sigma_beta`), sampling (`token_stride`, `collect_every`), rarer inverses
    (`refresh_every`) and blocks (`block_diagonal`) make it fast.

    Args:
        gamma: γ, damping relative to the mean eigenvalue of Σ; where a source writes it relative to
            the trace, γ = d_in · γ_trace.
        sigma_beta: β of an average of Σ over refreshes, bias-corrected; None: only the newest.
        refresh_every: steps between two P.
        collect_every: steps between two that add to Σ; divides `refresh_every`.
        token_stride: one token in so many adds to Σ, beginning elsewhere in each sequence and step.
        exponent: p of (Σ + γ̄ I)^(-1/p): 1 (the paper), 2 or 4.
        inverse: cholesky (for p > 1 an eigendecomposition) or newton_schulz.
        trace_normalized: multiply P by the p-th root of the mean eigenvalue of Σ, so that M keeps
            the scale of G, and what is tuned to it (eps, clipping, width rules) keeps its meaning.
        block_diagonal: widest block of Σ; wider inputs are cut into equal blocks. None: no blocks.
        embeddings: also divide the rows of embeddings by (token frequency + γ̄).
        include, exclude: names of modules, with `*` and `?`, to cover or to leave alone.
    Raises:
        ValueError: a setting outside its range (all such problems at once), or nothing to cover.
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
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> None:
        self.settings = Settings(
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
        )
        covered, self._not_covered = find_layers(
            model, include=include, exclude=exclude, embeddings=embeddings
        )
        self._shapes = {
            name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)
        }
        self.layers = [Layer(each, block_diagonal, token_stride) for each in covered]
        self._hooks: list[Any] = []
        self._written = WeakTensorKeyDictionary()  # gradients that are M: version, tokens so far
        for layer in self.layers:
            install(layer.covered.module, layer.capture)

    def attach(self, *optimizers: Optimizer) -> ActivationPreconditioner:
        """Precondition before every step of these optimizers, which hold every covered weight.

        Raises:
            TypeError: not a torch.optim.Optimizer.
            ValueError: a covered weight is in none of them or in several, or this preconditioner
                is attached already.
            RuntimeError: several processes train together, which is not supported yet.
        """
        if self._hooks or not self.layers:
            state = "attached already; pass all optimizers to one call of attach"
            raise ValueError(state if self._hooks else "detached; make a new preconditioner")
        is_parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        if is_parallel and torch.distributed.get_world_size() > 1:
            raise RuntimeError("Σ is summed in one process only: every rank would differ")
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                raise TypeError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer")
        owners = Counter(p for each in optimizers for p in _parameters(each))
        wrong = [
            f"{layer.name}.weight is in {owners[layer.covered.weight]}"
            for layer in self.layers
            if owners[layer.covered.weight] != 1
        ]
        if wrong:
            raise ValueError(
                "every covered weight must be in exactly one of the optimizers: "
                + "; ".join(wrong)
                + ". Attach all optimizers in one call, or exclude these layers"
            )
        self._hooks = [each.register_step_pre_hook(self._before_step) for each in optimizers]
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
            self._schedule_next(layer)

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs, by layer; keep it beside the optimizer's."""
        return {layer.name: layer.state_dict() for layer in self.layers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`, bit for bit.

        Raises:
            ValueError: other layers or shapes, all listed; nothing was changed.
        """
        names = {layer.name for layer in self.layers}
        problems = [f"missing {name}" for name in sorted(names - state.keys())]
        problems += [f"unexpected {name}" for name in sorted(state.keys() - names)]
        for layer in self.layers:
            problems += layer.state_problems(state[layer.name]) if layer.name in state else []
        if problems:
            raise ValueError("preconditioner state does not fit: " + "; ".join(problems))
        for layer in self.layers:
            layer.load_state_dict(state[layer.name])
            self._schedule_next(layer)

    def report(self) -> list[dict[str, Any]]:
        """One row per weight: is it covered, or why not; memory, condition number, ‖M‖/‖G‖."""
        rows = [layer.report() for layer in self.layers]
        blank = {"covered": False, "bytes": 0, "condition": None, "norm_ratio": None, "mended": 0}
        for name, reason in self._not_covered.items():
            rows.append({"name": name, "shape": self._shapes.get(name), "reason": reason, **blank})
        return rows

    def summary(self) -> str:
        """What is covered and what is not, for people; see `report` for every number."""
        n_bytes = sum(layer.n_bytes for layer in self.layers)
        reasons = "".join(f"\n  not {name}: {why}" for name, why in self._not_covered.items())
        state = "" if self._hooks else "; not attached: no optimizer is preconditioned"
        return f"DoPr covers {len(self.layers)} weights, {n_bytes / 2**20:.1f} MiB{state}{reasons}"

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]):
        """The hook: precondition the gradients, or wrap the closure that will compute them."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._precondition(optimizer)
            return None
        wrapped = self._wrap(closure, optimizer)
        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, kwargs | {"closure": wrapped}

    def _wrap(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        """The closure, with its gradients preconditioned; it may be called once a step."""
        n_calls = 0

        def preconditioned_closure() -> Any:
            nonlocal n_calls
            n_calls += 1
            if n_calls > 1:
                raise RuntimeError(
                    f"{type(optimizer).__name__} calls its closure several times a step (a line "
                    "search?), which activation preconditioning does not support"
                )
            loss = closure()
            self._precondition(optimizer)
            return loss

        return preconditioned_closure

    @torch.no_grad()
    def _precondition(self, optimizer: Optimizer) -> None:
        """Replace G by M in every covered weight that this optimizer holds."""
        owned = _parameters(optimizer)
        layers = [
            layer
            for layer in self.layers
            if layer.covered.weight in owned and not self._is_done(layer)
        ]
        refreshed = refresh([layer for layer in layers if self._is_due(layer)], self.settings)
        for layer in layers:
            grad = layer.covered.weight.grad
            if grad is not None and layer.n_refreshes:
                G = layer.covered.as_matrix(grad)  # (d_out, d_in)
                M = precondition(G, layer.P)
                if layer in refreshed:
                    layer.norm_ratio = norm_ratio(M, G)
                layer.covered.write(M, grad)
                self._written[grad] = grad._version, layer.capture.count.clone()
            layer.step += 1
            self._schedule_next(layer)

    def _is_done(self, layer: Layer) -> bool:
        """Whether the gradient is M already: a `step` that calls its parent's comes here twice."""
        grad = layer.covered.weight.grad
        if grad is None or grad not in self._written:
            return False
        version, count = self._written[grad]
        return grad._version == version and torch.equal(layer.capture.count, count)

    def _is_due(self, layer: Layer) -> bool:
        return layer.step >= layer.next_refresh

    def _schedule_next(self, layer: Layer) -> None:
        """Whether, and from which offset, the coming step adds to the layer's statistics."""
        on_schedule = layer.step % self.settings.collect_every == 0
        layer.capture.is_collecting = on_schedule or self._is_due(layer)
        layer.capture.offset.fill_(layer.step // self.settings.collect_every)


def _parameters(optimizer: Optimizer) -> set[Tensor]:
    return {param for group in optimizer.param_groups for param in group["params"]}
