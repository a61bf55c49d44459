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
FOR_MATRICES = ("muon", "adamuon", "adago", "normuon", "muonclip", "distributedmuon")
FOR_MATRICES += ("spectralsphere",)
ELSEWHERE = {"params": "they are the model's", "lr": "use lr", "weight_decay": "use weight_decay"}
USUAL_LR = 1e-3
WORDS = {"true": True, "false": False, "none": None}  # as in the other settings
OTHER_OBJECTS = ("model", "optimizer", "base_optimizer")  # what wrappers are built from
RANK = "without a rank in its param groups, which cannot be given here, it is a variant of Adam"
UNUSABLE = {"galore": RANK, "fira": RANK, "apollo": RANK}  # they train, but not as their names say
# Elementwise classes some of whose operations torch 2.13 does not have for shards (DTensor). Those
# with True work with foreach=false.
UNSHARDED = {
    **dict.fromkeys(("adasmooth", "diffgrad", "ftrl", "srmm", "sara", "swats"), False),
    **dict.fromkeys(("adopt", "ranger", "adan"), True),
}
MARK = "third_party"  # attribute of the optimizers built here


@dataclass(frozen=True)
class ThirdParty:
    """An optimizer class and the arguments that it is built with."""

    name: str
    kind: type[Optimizer]
    arguments: dict[str, Any]
    is_for_matrices: bool  # only; AdamW trains the other parameters

    @property
    def has_weight_decay(self) -> bool:
        return "weight_decay" in _parameters(self.kind)

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
        setattr(optimizer, MARK, self.name)
        return optimizer


def is_third_party(optimizer: Optimizer) -> bool:
    """Whether an optimizer was built here, also if its class is one that we use ourselves."""
    return hasattr(optimizer, MARK)


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
        for i, (key, each) in enumerate(_parameters(kind).items())
        if each.default is each.empty
        and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        and i > 0
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
    except ImportError as error:  # the class exists, and needs another package
        raise ValueError(f"optimizer={name!r}: {error}") from None
    except (NotImplementedError, ValueError):
        raise ValueError(f"optimizer={name!r}: {_unknown(name)}") from None


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), known_names(), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"no optimizer has this name; {hint}any other class can be given as package.module:Class"


def _in_module(name: str, module_name: str, class_name: str) -> type:
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        raise ValueError(
            f"optimizer={name!r}: {module_name} cannot be imported from here: "
            f"{type(error).__name__}: {error}"
        ) from error
    found = _class_in(module, class_name)
    if found:
        return found
    names = [each for each, value in vars(module).items() if _is_optimizer(value)]
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
    if reason := UNUSABLE.get(kind.__name__.lower()):
        raise ValueError(f"optimizer={name}: {kind.__name__} cannot be used: {reason}")
    first, *others = _parameters(kind)
    if first in OTHER_OBJECTS:
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
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError
        if call.args or any(each.arg is None for each in call.keywords):
            raise ValueError
        pairs = [(str(each.arg), _literal(each.value)) for each in call.keywords]
    except (SyntaxError, TypeError, ValueError):
        raise ValueError(
            f"{where}: must be written as name=value, name=value, ..., with text in quotes"
        ) from None
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"{where}: a name is given twice")
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
    default = _parameters(kind)["lr"].default
    return float(default) if isinstance(default, (int, float)) else USUAL_LR


def _argument_names(kind: type) -> list[str]:
    return [
        key
        for i, (key, each) in enumerate(_parameters(kind).items())
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        and i > 0
        and key not in ELSEWHERE
    ]


def _literal(node: ast.expr) -> Any:
    """Return the value of a Python literal, in which true, false and none are allowed."""
    return ast.literal_eval(_Words().visit(node))


class _Words(ast.NodeTransformer):
    """Replace true, false and none by the constants of Python."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        is_word = node.id.lower() in WORDS
        return ast.Constant(WORDS[node.id.lower()]) if is_word else node


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of a class; with those of its parents, if it passes lr on to them."""
    found = dict(inspect.signature(kind).parameters)
    for parent in kind.__mro__[1:]:
        is_passed_on = any(each.kind is each.VAR_KEYWORD for each in found.values())
        if "lr" in found or not is_passed_on or parent is Optimizer:
            break
        found = {**found, **inspect.signature(parent).parameters}
    return found
