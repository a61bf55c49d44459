"""What the callbacks of all trainers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..dopr.preconditioner import ActivationPreconditioner


def refuse(problems: Sequence[str]) -> None:
    """Raise ValueError if there are reasons why DoPr cannot precondition this training."""
    if problems:
        raise ValueError("DoPr does not support this training: " + "; ".join(problems))


class AttachedInTraining:
    """Attach a preconditioner when training begins, and detach it when training ends."""

    preconditioner: ActivationPreconditioner | None = None
    _last_summary: str = ""
    _last_report: Sequence[dict[str, Any]] = ()

    def __init__(self, *, gamma: float, **settings: Any) -> None:
        self._settings = {"gamma": gamma, **settings}

    def summary(self) -> str:
        """Return `preconditioner.summary()`; after training, what it was before detaching."""
        return self._last_summary if self.preconditioner is None else self.preconditioner.summary()

    def report(self) -> list[dict[str, Any]]:
        """Return `preconditioner.report()`; after training, what it was before detaching."""
        if self.preconditioner is None:
            return [*self._last_report]
        return self.preconditioner.report()

    def detach(self) -> None:
        """Detach the preconditioner if training did not: if it raised, or was interrupted."""
        if self.preconditioner is not None:
            self._last_summary, self._last_report = self.summary(), self.report()
            self.preconditioner.detach()
            self.preconditioner = None

    def _attach(self, model: Any, optimizers: Sequence[Any], state: dict[str, Any] | None) -> None:
        """Attach a new preconditioner, with this state if there is one. On error, attach none."""
        self.detach()
        self.preconditioner = ActivationPreconditioner(model, **self._settings)
        try:
            self.preconditioner.attach(*optimizers)
            if state is not None:
                self.preconditioner.load_state_dict(state)
        except BaseException:
            self.detach()
            raise
