"""Names of optimizers in comparisons: `adamw`, `dopr-muon`, `fast-dopr-adamw`, `sgd+momentum=0.9`.

NAME                the optimizer as train.py knows it
dopr-NAME           with activation preconditioning in exact mode, the paper's
fast-dopr-NAME      the same in fast mode
...+key=value       with any other setting of train.py changed
"""

import contextlib
from dataclasses import dataclass
from typing import Any

from optim.build import OPTIMIZERS

PLAIN = {"dopr": False}
EXACT = {"dopr": True, "refresh_every": 1}
FAST = {"dopr": True, "refresh_every": 10, "sigma_beta": 0.95}
MODES = {"fast-dopr-": FAST, "dopr-": EXACT, "": PLAIN}


@dataclass(frozen=True)
class Variant:
    """One optimizer of a comparison, and the settings of train.py that make it."""

    name: str
    optimizer: str
    settings: tuple[tuple[str, Any], ...]

    @property
    def base(self) -> str:
        """What it is compared with: the same optimizer without DoPr."""
        return self.optimizer


def parse_variant(name: str) -> Variant:
    """The variant of that name. ValueError: the name of no optimizer, or a change without `=`."""
    kind, *changes = name.split("+")
    prefix = next(prefix for prefix in MODES if kind.startswith(prefix))
    optimizer = kind.removeprefix(prefix)
    if optimizer not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ValueError(
            f"optimizer {name!r}: wants [fast-][dopr-]NAME[+key=value...], NAME one of {known}"
        )
    wrong = [change for change in changes if "=" not in change]
    if wrong:
        raise ValueError(f"optimizer {name!r}: {wrong[0]!r} is not of the form key=value")
    pairs = (change.split("=", 1) for change in changes)
    changed = {key: _number_or_text(value) for key, value in pairs}
    settings = {"optimizer": optimizer} | MODES[prefix] | changed
    return Variant(name, optimizer, tuple(settings.items()))


def _number_or_text(text: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
