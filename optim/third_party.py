"""Find an optimizer class of torch.optim, pytorch_optimizer or another package by its name.

    nadam                  a class of torch.optim, or else of pytorch_optimizer
    torch:muon             a class of torch.optim
    package.module:Class   a class of any module that can be imported; case does not matter

Arguments of the class are written as in Python: `betas=(0.9, 0.95), amsgrad=true`.
"""

import ast
import difflib
import importlib
import inspect
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from .groups import Role

Roles = Literal["auto", "matrices", "all"]

PACKAGE = "pytorch_optimizer"  # where names without a module are looked up after torch.optim
SHORT_NAMES = {"torch": "torch.optim"}
# Classes that orthogonalize, and are meant for the weights of hidden layers only. `roles` overrides
# this table.
FOR_MATRICES = {
    *("muon", "adamuon", "adago", "normuon", "muonclip", "distributedmuon", "spectralsphere"),
}
ELSEWHERE = {"params": "they are the model's", "lr": "use lr", "weight_decay": "use weight_decay"}
USUAL_LR = 1e-3
WORDS = {"true": True, "false": False, "none": None}  # as in the other settings


@dataclass(frozen=True)
class ThirdParty:
    """An optimizer class and the arguments that it is built with."""

    name: str
    kind: type[Optimizer]
    arguments: dict[str, Any]
    is_for_matrices: bool  # only; AdamW trains the other parameters

    @property
    def has_weight_decay(self) -> bool:
        return "weight_decay" in inspect.signature(self.kind).parameters

    @property
    def default_lr(self) -> float:
        """The learning rate that the class has if none is given; USUAL_LR if it has none."""
        return _default_lr(self.kind)

    def holds(self, role: Role) -> bool:
        """Whether the class, and not AdamW, trains parameters of this role."""
        return role == "matrix" or not self.is_for_matrices

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Return the optimizer of param groups that have the keys `lr`, `weight_decay` and `role`.

        A class without weight decay does not get this key. The key `use_muon` is for the classes of
        pytorch_optimizer that train matrices by Muon and other parameters by an AdamW of their own.
        """
        groups = [{**group, "use_muon": group["role"] == "matrix"} for group in groups]
        if not self.has_weight_decay:
            for group in groups:
                del group["weight_decay"]
        optimizer = self.kind(groups, lr=groups[0]["lr"], **self.arguments)  # pyright: ignore
        if hasattr(optimizer, "train"):
            optimizer.train()  # pyright: ignore[reportAttributeAccessIssue]
        return optimizer


def find(name: str, arguments: str = "", roles: Roles = "auto") -> ThirdParty:
    """Return the optimizer class with that name, and its arguments.

    Raises:
        ValueError: no such class is installed, it is not an optimizer that trains parameters from
            their gradients at a learning rate, or it does not take an argument.
    """
    kind = _find_class(name)
    _check_kind(name, kind)
    parsed = _parse_arguments(arguments, kind)
    needed = [
        key
        for key, each in inspect.signature(kind).parameters.items()
        if each.default is each.empty
        and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        and key not in ELSEWHERE | parsed
    ]
    if needed:
        raise ValueError(
            f"optimizer={name}: {kind.__name__} needs {', '.join(needed)}; "
            f"add it to optimizer_args, such as --optimizer_args='{needed[0]}=...'"
        )
    is_for_matrices = kind.__name__.lower() in FOR_MATRICES if roles == "auto" else roles != "all"
    return ThirdParty(name, kind, parsed, is_for_matrices)


def argument_names(name: str) -> list[str]:
    """Return the names that `arguments` can give. Raises ValueError if there is no such class."""
    return _argument_names(_find_class(name))


def default_lr(name: str) -> float:
    """Return the learning rate that a class has if none is given; USUAL_LR if it has none.

    Raises ValueError if there is no such class.
    """
    return _default_lr(_find_class(name))


def known_names() -> list[str]:
    """Return the names without a module: ours, torch.optim's and those of pytorch_optimizer."""
    names = {each.lower() for each in dir(torch.optim) if _is_optimizer(getattr(torch.optim, each))}
    names |= {"signum", "adamuon"}  # of our five, those that torch.optim does not have
    with suppress(ImportError):
        names |= {*importlib.import_module(PACKAGE).get_supported_optimizers()}
    return sorted(names)


def _find_class(name: str) -> type:
    if ":" in name:
        module_name, _, class_name = name.partition(":")
        return _in_module(name, SHORT_NAMES.get(module_name, module_name), class_name)
    found = _class_in(torch.optim, name)
    if found:
        return found
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError:
        hint = f"; {PACKAGE} has many more, but is not installed: pip install {PACKAGE}"
        raise ValueError(f"optimizer={name!r}: {_unknown(name)}{hint}") from None
    try:
        return package.load_optimizer(name.lower())
    except (ImportError, NotImplementedError, ValueError):
        raise ValueError(f"optimizer={name!r}: {_unknown(name)}") from None


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), known_names(), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"no optimizer has this name; {hint}any other class can be given as package.module:Class"


def _in_module(name: str, module_name: str, class_name: str) -> type:
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"optimizer={name!r}: {module_name} cannot be imported: {error}") from None
    found = _class_in(module, class_name)
    if found:
        return found
    names = [each for each in dir(module) if _is_optimizer(getattr(module, each))]
    close = difflib.get_close_matches(class_name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"optimizer={name!r}: {module_name} has no class {class_name!r}{hint}")


def _class_in(module: Any, name: str) -> type | None:
    """Return the class with that name, whatever its case, preferring an exact match."""
    names = [each for each in dir(module) if each.lower() == name.lower()]
    classes = [getattr(module, each) for each in sorted(names, key=lambda each: each != name)]
    return next((each for each in classes if isinstance(each, type)), None)


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer


def _check_kind(name: str, kind: type) -> None:
    """Raise ValueError unless the class trains parameters from their gradients."""
    if not _is_optimizer(kind):
        raise ValueError(f"optimizer={name}: {kind.__name__} is not a torch.optim.Optimizer")
    first, *others = inspect.signature(kind).parameters
    if first != "params":
        raise ValueError(
            f"optimizer={name}: {kind.__name__} is built from {first!r}, not from parameters: "
            "wrappers of optimizers, and classes that need the whole model, cannot be used here"
        )
    if "lr" not in others:
        raise ValueError(
            f"optimizer={name}: {kind.__name__} has no argument lr, which the schedule sets; "
            "wrappers such as SAM cannot be used here"
        )
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure and closure.default is closure.empty:
        raise ValueError(
            f"optimizer={name}: {kind.__name__} evaluates the loss several times in a step through "
            "a closure; a step here has one gradient"
        )


def _parse_arguments(text: str, kind: type) -> dict[str, Any]:
    """Return the arguments in `text`. Raises ValueError if the class does not take one of them."""
    where = f"optimizer_args={text!r}"
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(each.arg is None for each in call.keywords):
            raise ValueError
        values = {str(each.arg): _literal(each.value) for each in call.keywords}
    except (AssertionError, SyntaxError, ValueError):
        raise ValueError(f"{where}: must be written as name=value, name=value, ...") from None
    names = _argument_names(kind)
    for key in values:
        if key in ELSEWHERE:
            raise ValueError(f"{where}: {key} cannot be given here, {ELSEWHERE[key]}")
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(names)}"
            raise ValueError(f"{where}: {kind.__name__} has no argument {key!r}; {hint}")
    return values


def _default_lr(kind: type) -> float:
    default = inspect.signature(kind).parameters["lr"].default
    return float(default) if isinstance(default, (int, float)) else USUAL_LR


def _argument_names(kind: type) -> list[str]:
    return [
        key
        for key, each in inspect.signature(kind).parameters.items()
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY) and key not in ELSEWHERE
    ]


def _literal(node: ast.expr) -> Any:
    """Return the value of a Python literal, in which true, false and none are allowed."""
    if isinstance(node, ast.Name) and node.id.lower() in WORDS:
        return WORDS[node.id.lower()]
    return ast.literal_eval(node)
