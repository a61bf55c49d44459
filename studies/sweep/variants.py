"""Parse the names of optimizers in comparisons: `adamw`, `dopr-muon`, `sgd+momentum=0.9`.

NAME                the optimizer as train.py knows it
dopr-NAME           with activation preconditioning in exact mode, the paper's
fast-dopr-NAME      the same in fast mode
...+key=value       with any other setting of train.py changed
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from optim.build import OPTIMIZERS
from trainer.config import coerce
from trainer.settings import FIELDS

PLAIN = {"dopr": False}
EXACT = {"dopr": True, "refresh_every": 1}
FAST = {"dopr": True, "refresh_every": 10, "sigma_beta": 0.95}
MODES = {"fast-dopr-": FAST, "dopr-": EXACT, "": PLAIN}
STUDY_SETTINGS = {  # the comparison itself sets these
    *("optimizer", "dopr", "lr", "seed", "max_steps", "batch_size", "micro_batch_size"),
    *("dataset", "out_dir", "resume", "device"),
}
MODEL_SETTINGS = {
    *("n_layer", "n_head", "n_embd", "block_size", "dropout", "bias", "tie_weights", "init_from"),
    *("mup", "mup_base_width", "mup_base_head_dim"),
}


@dataclass(frozen=True)
class Variant:
    """An optimizer of a comparison with its settings of train.py."""

    name: str
    optimizer: str
    settings: tuple[tuple[str, Any], ...]

    @property
    def base(self) -> str:
        """The variant to compare with: the same optimizer without DoPr."""
        return self.optimizer


def parse_variant(name: str) -> Variant:
    """Return the variant with that name.

    Raises ValueError if the optimizer is unknown or a change does not concern the optimizer.
    """
    kind, *changes = name.split("+")
    prefix = next(prefix for prefix in MODES if kind.startswith(prefix))
    optimizer = kind.removeprefix(prefix)
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"optimizer {name!r}: expected [fast-][dopr-]NAME[+key=value...] with NAME one of "
            f"{', '.join(OPTIMIZERS)}"
        )
    texts = parse_changes(changes, STUDY_SETTINGS | MODEL_SETTINGS, f"optimizer {name!r}")
    changed = {key: coerce(key, text) for key, text in texts.items()}
    settings = {"optimizer": optimizer} | MODES[prefix] | changed
    return Variant(name, optimizer, tuple(settings.items()))


def parse_dopr_variant(name: str, task: str, known: set[str], *others: str) -> Variant:
    """Return the variant with that name, for a task whose models train.py does not train.

    Raises ValueError if it changes a setting that the task does not have: only the settings of DoPr
    in `known` can be changed, and the `others`.
    """
    variant = parse_variant(name)
    settings = dict(variant.settings)
    can_change = known if settings["dopr"] else set()
    if unknown := sorted(settings.keys() - can_change - {"optimizer", "dopr", *others}):
        raise ValueError(
            f"optimizer {name!r}: task {task} has no setting {', '.join(unknown)} here; "
            f"only {', '.join(sorted(known))} of DoPr can be changed"
            + (f", and {', '.join(others)}" if others else "")
        )
    return variant


def parse_changes(pairs: Iterable[str], refused: set[str], where: str = "--set") -> dict[str, str]:
    """Return the settings of train.py in `pairs` of the form key=value.

    Raises ValueError, which begins with `where`, if one is malformed, unknown or in `refused`.
    """
    if malformed := [pair for pair in pairs if "=" not in pair]:
        raise ValueError(f"{where}: {malformed[0]!r} is not of the form key=value")
    changes = dict(pair.split("=", 1) for pair in pairs)
    for key in changes:
        if key in refused:
            raise ValueError(f"{where}: {key} is fixed here, it is the same for all optimizers")
        if key not in FIELDS:
            close = difflib.get_close_matches(key, FIELDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "python train.py --help lists all"
            raise ValueError(f"{where}: unknown setting {key!r}; {hint}")
    return changes
