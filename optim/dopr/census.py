"""Notice that the model changed under the preconditioner: layers replaced, tied, added, frozen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from .coverage import Selection, survey
from .forwards import is_captured
from .layer import Layer, log
from .weights import weights_of

CURE = (
    "detach() this preconditioner, and construct and attach a new one after the last change to the "
    "model"
)


class Census:
    """Compare the model as it is with the layers that were covered at construction.

    The comparison reads Python objects only, never a tensor's values.
    """

    def __init__(self, model: nn.Module, selection: Selection, layers: Sequence[Layer]) -> None:
        self._model, self._selection, self._layers = model, selection, layers
        self._own = {layer.covered.module for layer in layers}
        self._shapes = {layer: layer.covered.weight.shape for layer in layers}
        self._seen = {self._fingerprint()}  # fingerprints that `check` has already examined
        self._warned: set[str] = set()

    def check(self, stepped: Sequence[Layer]) -> None:
        """Raise if a covered layer can no longer be preconditioned; warn once of other changes.

        Args:
            stepped: the layers whose weights are about to be updated.
        Raises:
            RuntimeError: if a covered layer was replaced or removed, its weight was tied to
                another one or has another shape, or its capturing forward was removed.
        """
        fingerprint = self._fingerprint()
        if fingerprint in self._seen:
            return
        self._raise(self.lost())
        self._warn(self._new(), f"new, and trained without preconditioning. {CURE}")
        frozen = [layer.covered.full_name for layer in _frozen(stepped)]
        self._warn(frozen, "covered, but frozen now")
        self._seen.add(fingerprint)

    def check_before_attaching(self) -> None:
        """Raise RuntimeError if a covered layer can no longer be preconditioned, or is frozen."""
        self._raise(dict.fromkeys(_frozen(self._layers), "was frozen") | self.lost())

    def _raise(self, lost: dict[Layer, str]) -> None:
        if lost:
            listed = "; ".join(f"{layer.covered.full_name} {why}" for layer, why in lost.items())
            raise RuntimeError(f"the model changed after construction: {listed}. {CURE}")

    def forget(self) -> None:
        """Release the layers, after they were detached."""
        self._layers, self._own, self._shapes = [], set(), {}

    def lost(self) -> dict[Layer, str]:
        """Return the covered layers that can no longer be preconditioned, and why."""
        modules = {*self._model.modules()}
        uses = Counter(weight.parameter for weight in weights_of(self._model))
        lost = {}
        for layer in self._layers:
            module, weight = layer.covered.module, layer.covered.weight
            if module not in modules:
                lost[layer] = "was replaced or removed"
            elif not isinstance(weight, nn.Parameter):
                lost[layer] = "was pruned or reparametrized (weight_norm, spectral_norm)"
            elif uses[weight] > 1:
                lost[layer] = "was tied to another layer"
            elif weight.shape != self._shapes[layer]:
                is_flat = weight.dim() == 1
                cause = " (FSDP1 flattens weights: use fully_shard instead)" if is_flat else ""
                shapes = f"from {tuple(self._shapes[layer])} to {tuple(weight.shape)}"
                lost[layer] = f"changed its shape {shapes}{cause}"
            elif not is_captured(module, layer.capture):
                lost[layer] = "lost its capturing forward"
        return lost

    def now(self) -> tuple[list[Layer], dict[str, str]]:
        """Return the covered layers of the model as it is, and {weight name: reason} of others."""
        possible, reasons = survey(self._model, self._selection, self._own)
        modules = {each.module for each in possible}
        lost = self.lost()
        layers = [x for x in self._layers if x.covered.module in modules and x not in lost]
        kept = {each.covered.module for each in layers}
        new = [each.full_name for each in possible if each.module not in kept]
        added = "new: it was added or unfrozen after construction"
        reasons |= dict.fromkeys(new, added if self._layers else "the preconditioner was detached")
        reasons |= {layer.covered.full_name: why for layer, why in lost.items()}
        return layers, reasons

    def rows(self, *, condition: bool) -> list[dict[str, Any]]:
        """Return a row for every weight of two or more dimensions; see `Layer.report`."""
        layers, reasons = self.now()
        shapes = {each.full_name: tuple(each.parameter.shape) for each in weights_of(self._model)}
        blank = dict.fromkeys(("block_width", "condition", "norm_ratio"))
        blank |= {"covered": False, "bytes": 0}
        return [layer.report(condition=condition) for layer in layers] + [
            {"name": name, "shape": shapes.get(name), "reason": reason, **blank, "fallbacks": 0}
            for name, reason in reasons.items()
        ]

    def share(self, *, without_excluded: bool = False) -> float:
        """Return the number of covered parameters relative to all that are trained.

        Args:
            without_excluded: leave out weights that `include` and `exclude` skip.
        """
        trained = {parameter for parameter in self._model.parameters() if parameter.requires_grad}
        if without_excluded:
            weights = weights_of(self._model)
            trained -= {each.parameter for each in weights if self._selection.skips(each)}
        covered = trained & {layer.covered.weight for layer in self.now()[0]}
        return sum(p.numel() for p in covered) / max(1, sum(p.numel() for p in trained))

    def warn_below_half(self) -> None:
        """Log a warning if less than half of the parameters that could be covered are covered."""
        if (share := self.share(without_excluded=True)) < 0.5:
            log.warning(
                "DoPr covers only %.0f %% of the trained parameters; see summary()", 100 * share
            )

    def warn_of_narrow_blocks(self, widest: int | None) -> None:
        """Log the layers whose blocks of Σ are less than half as wide as `widest` allows."""
        narrow = []
        for layer in self._layers:
            d, b = layer.covered.d_in, layer.shape[-1]
            if widest is not None and 2 * b < min(widest, d):
                wider = next(n for n in range(widest + 1, d + 1) if d % n == 0)
                narrow.append(f"{layer.label} (blocks of {b}; {wider} divides its {d} inputs)")
        if narrow:
            log.warning(
                "block_diagonal=%d leaves narrow blocks, as equal ones must divide the width: %s. "
                "Set it to a width that suits all of them, or pass these layers to exclude=",
                widest,
                ", ".join(narrow),
            )

    def _new(self) -> list[str]:
        covered, _ = survey(self._model, self._selection, self._own)
        return [each.full_name for each in covered if each.module not in self._own]

    def _warn(self, names: list[str], what: str) -> None:
        """Log the weights that no earlier warning named."""
        if new := [name for name in names if name not in self._warned]:
            self._warned |= {*new}
            log.warning("the model changed: %s: %s", ", ".join(new), what)

    def _fingerprint(self) -> int:
        return hash(
            tuple(
                (id(module), id(weight), weight.shape, weight.requires_grad)
                for module in self._model.modules()
                for weight in module._parameters.values()
                if weight is not None and not isinstance(weight, UninitializedParameter)
            )
        )


def _frozen(layers: Sequence[Layer]) -> list[Layer]:
    return [layer for layer in layers if not layer.covered.weight.requires_grad]
