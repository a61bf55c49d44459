"""Parse the names of optimizers in comparisons: `adamw`, `dopr-muon`, `sgd+momentum=0.9`.

NAME                the optimizer as train.py knows it, such as muon, soap or torch:muon
dopr-NAME           with activation preconditioning in exact mode, the paper's
fast-dopr-NAME      the same in fast mode
...+key=value       with any other setting of train.py changed, or an argument of the class that
                    NAME stands for: soap+precondition_frequency=5, lion+betas=(0.9,0.95). Behind
                    DoPr, names such as gamma that both have are DoPr's
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from optim.build import OPTIMIZERS, has_aux, third_party
from optim.third_party import argument_names
from trainer.config import coerce
from trainer.presets import DOPR_KEYS
from trainer.settings import FIELDS

FIXED = ("optimizer", "optimizer_args", "dopr")  # settings that the name itself gives
DOPR_SETTINGS = {*DOPR_KEYS, "include", "exclude"}
PLAIN = {"dopr": False}
EXACT_DOPR: dict[str, Any] = {"refresh_every": 1}  # settings of ActivationPreconditioner
FAST_DOPR: dict[str, Any] = {"refresh_every": 10, "sigma_beta": 0.95}
EXACT, FAST = {"dopr": True} | EXACT_DOPR, {"dopr": True} | FAST_DOPR  # of train.py
FAST_PREFIX = "fast-dopr-"
MODES = {FAST_PREFIX: FAST, "dopr-": EXACT, "": PLAIN}
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
    def has_aux(self) -> bool:
        """Whether an AdamW trains the parameters that are not matrices."""
        settings = dict(self.settings)
        args, roles = settings.get("optimizer_args", ""), settings.get("optimizer_roles", "auto")
        return has_aux(self.optimizer, third_party(self.optimizer, args, roles))

    @property
    def base(self) -> str:
        """The name of the variant to compare with: the same without DoPr and its settings."""
        changes = self.name.split("+")[1:]
        dropped = DOPR_SETTINGS if dict(self.settings).get("dopr") else ()
        kept = [each for each in changes if each.partition("=")[0] not in dropped]
        return "+".join([self.optimizer, *kept])


def parse_variant(name: str) -> Variant:
    """Return the variant with that name.

    Raises ValueError if the optimizer is unknown or cannot be used, or a change does not concern
    the optimizer.
    """
    kind, *changes = name.split("+")
    prefix = next(prefix for prefix in MODES if kind.startswith(prefix))
    optimizer, where = kind.removeprefix(prefix), f"optimizer {name!r}"
    try:
        own = [] if optimizer in OPTIMIZERS else argument_names(optimizer)
        own = [key for key in own if not (prefix and key in DOPR_SETTINGS)]
        arguments = [each for each in changes if each.partition("=")[0] in own]
        third_party(optimizer, ",".join(arguments))
    except ValueError as error:
        raise ValueError(
            f"{where}: expected [fast-][dopr-]NAME[+key=value...]; {error}; NAME is one of "
            f"{', '.join(OPTIMIZERS)}, or another class (see train.py --help)"
        ) from error
    others = [each for each in changes if each not in arguments]
    texts = parse_changes(others, STUDY_SETTINGS | MODEL_SETTINGS, where, own)
    changed = {key: coerce(key, text) for key, text in texts.items()}
    if arguments:
        changed["optimizer_args"] = ",".join(arguments)
    settings = {"optimizer": optimizer} | MODES[prefix] | changed
    return Variant(name, optimizer, tuple(settings.items()))


def split(names: str) -> list[str]:
    """Split at commas that are not between parentheses: `lion+betas=(0.9,0.95),adamw`."""
    return re.split(r",(?![^(]*\))", names)


def parse_changes(
    pairs: Iterable[str], refused: set[str], where: str = "--set", others: Iterable[str] = ()
) -> dict[str, str]:
    """Return the settings of train.py in `pairs` of the form key=value.

    Raises ValueError, which begins with `where`, if one is malformed, unknown or in `refused`. It
    suggests the most similar name, also one of `others`.
    """
    if malformed := [pair for pair in pairs if "=" not in pair]:
        raise ValueError(f"{where}: {malformed[0]!r} is not of the form key=value")
    keys = [pair.partition("=")[0] for pair in pairs]
    if repeated := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
        raise ValueError(f"{where}: {repeated[0]} is given more than once")
    changes = dict(pair.split("=", 1) for pair in pairs)
    for key in changes:
        if key in refused:
            raise ValueError(f"{where}: {key} is fixed here, it is the same for all optimizers")
        if key not in FIELDS:
            close = difflib.get_close_matches(key, [*FIELDS, *others], n=1)
            hint = f"did you mean {close[0]!r}?" if close else "python train.py --help lists all"
            raise ValueError(f"{where}: unknown setting {key!r}; {hint}")
    return changes
