"""Find out what an optimizer class does, by stepping it on three small parameters.

The answers hold for a class with its arguments, within what is tried: 24 rows, 60 steps, a CPU. A
class that changes its behaviour later, or with the size of a weight, is not seen through.
"""

import inspect
import io
import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .groups import Role
from .third_party import ThirdParty

SHAPES: dict[Role, tuple[int, ...]] = {"matrix": (16, 12), "embedding": (24, 12), "gain": (12,)}
FIRST_ROWS = 5  # of the first of two shards
FEW, MANY = 12, 60  # steps; some classes adapt only after a number of steps
ROUNDING = 1e-4  # relative to the largest change of a weight
SIMILAR = 2e-2  # the same; leaves room for an eps
GRADIENT_SCALE = 64.0
WEIGHT_DECAY = 1e-2 / FEW  # times the learning rate: the weights shrink by 1 % in FEW steps


def check(third: ThirdParty) -> None:
    """Raise ValueError unless the optimizer can be stepped, saved and loaded as a trainer does it.

    A step must need nothing but gradients, change weights, depend on its learning rate, and not
    depend on the loss that a closure returns. All that changes must be finite and in the state of
    parameters or in the param groups, and training must continue from it bit for bit.
    """
    name, where = third.kind.__name__, f"optimizer={third.name}"
    try:
        usual, optimizer = _Run(third).result()
    except Exception as error:  # the class may raise anything
        text = f"{where}: {name} fails on three small parameters: {_line(error)}"
        raise ValueError(text) from error
    start, unused = _Run(third, steps=0).result()
    if not all(each.isfinite().all() for each in usual):
        raise ValueError(f"{where}: {name} turns finite gradients into weights that are not finite")
    if _equal(usual, start):
        raise ValueError(f"{where}: {name} changes no weight in {FEW} steps")
    slower = _Run(third, lr_scale_after=(FEW // 2, 0.5)).weights()
    moved = [not torch.equal(a, b) for a, b in zip(usual, start, strict=True)]
    if any(torch.equal(a, b) and m for a, b, m in zip(usual, slower, moved, strict=True)):
        raise ValueError(
            f"{where}: {name} does not use the learning rate of every step for all parameters, but "
            "the schedule sets it"
        )
    if "closure" in inspect.signature(third.kind.step).parameters:
        losses = [_Run(third, loss=each).weights() for each in (_constant_loss, _rising_loss)]
        if not _equal(*losses):
            raise ValueError(
                f"{where}: {name} uses the loss that a closure returns, but a step here has none"
            )
    _check_state(optimizer, unused, where)
    try:
        continued = _Run(third, resume_after=FEW // 2).weights()
    except Exception as error:
        raise ValueError(
            f"{where}: the state of {name} is not made of tensors and numbers that can be saved "
            f"and loaded: {_line(error)}"
        ) from error
    if not _equal(usual, continued):
        raise ValueError(
            f"{where}: {name} does not continue from its state_dict as if it had not been saved"
        )


def _check_state(optimizer: Optimizer, unused: Optimizer, where: str) -> None:
    """Raise ValueError unless a checkpoint can keep the state: of parameters, and finite.

    unused: the same optimizer before its first step.
    """
    saved, name = optimizer.state_dict(), type(optimizer).__name__
    extra = sorted(map(str, saved.keys() - {"state", "param_groups"}))
    extra += [f"state[{key!r}]" for key in saved["state"] if not isinstance(key, int)]
    if extra:
        raise ValueError(
            f"{where}: {name} keeps state that belongs to no parameter ({', '.join(extra)}), which "
            "checkpoints here do not have"
        )
    first = unused.state_dict()["param_groups"]
    values = [*saved["state"].values()]
    for old, group in zip(first, saved["param_groups"], strict=True):
        values += [value for key, value in group.items() if old.get(key) is not value]
    constants = [value for group in first for value in group.values()]
    if not all(_is_finite(value) or value in constants for value in values):
        raise ValueError(f"{where}: the state of {name} is not finite, as a diverged run's")


def _is_finite(tree: Any) -> bool:
    if isinstance(tree, Tensor):
        return tree.layout is torch.strided and bool(tree.isfinite().all())
    if isinstance(tree, (dict, list, tuple)):
        return all(map(_is_finite, tree.values() if isinstance(tree, dict) else tree))
    return not isinstance(tree, float) or math.isfinite(tree)


def has_flat_state(third: ThirdParty) -> bool:
    """Whether the state of a parameter has only tensors and numbers, no lists or dicts of them."""
    state = _Run(third).result()[1].state_dict()["state"]
    return not any(
        isinstance(value, (dict, list, tuple)) for each in state.values() for value in each.values()
    )


def is_elementwise(third: ThirdParty) -> bool:
    """Whether the update of an entry depends on this entry alone, so that shards can be trained."""
    return _effect(third, is_split=True) <= ROUNDING


def is_scale_invariant(third: ThirdParty) -> bool:
    """Whether the updates do not depend on the scale of the gradient, as in Adam and signSGD."""
    return _effect(third, gradient_scale=GRADIENT_SCALE) <= SIMILAR


def has_decoupled_decay(third: ThirdParty) -> bool:
    """Whether weight decay multiplies weights by 1 - lr · weight_decay and changes no update."""
    weights = first = _Run(third, steps=0).weights()
    shrink = 1 - WEIGHT_DECAY
    for step in range(FEW):
        before, after = (_Run(third, steps=each).weights() for each in (step, step + 1))
        weights = [shrink * w + b - a for w, a, b in zip(weights, before, after, strict=True)]
    decayed = _Run(third, weight_decay=WEIGHT_DECAY / third.default_lr).weights()
    return all(
        (a - b).abs().max() <= 0.1 * (1 - shrink**FEW) * w.abs().max()
        for a, b, w in zip(decayed, weights, first, strict=True)
    )


def seed_all(seed: int) -> None:
    """Seed the generators that optimizers draw from: torch's, Python's and NumPy's.

    Processes that seed them alike before a step stay equal, and a step can be repeated.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


@dataclass(frozen=True)
class _Run:
    """A short training at the default learning rate.

    The gradients do not depend on the weights: they are a fixed direction plus noise.
    """

    third: ThirdParty
    steps: int = FEW
    lr_scale_after: tuple[int, float] | None = None  # a step, and a factor on the later rates
    gradient_scale: float = 1.0
    weight_decay: float = 0.0
    is_split: bool = False  # train two row blocks of each weight by two optimizers
    loss: Callable[[int], float] | None = None  # function of the step, returned by a closure
    resume_after: int | None = None  # save and load after so many steps

    def weights(self) -> list[Tensor]:
        """Return the weights after the last step."""
        shards = [slice(None, FIRST_ROWS), slice(FIRST_ROWS, None)]
        with _kept_generators():
            parts = [self._train(rows)[0] for rows in (shards if self.is_split else [slice(None)])]
        return [torch.cat(each) for each in zip(*parts, strict=True)]

    def result(self) -> tuple[list[Tensor], Optimizer]:
        """Return the weights and the optimizer after the last step, without splitting."""
        with _kept_generators():
            return self._train(slice(None))

    def _train(self, rows: slice) -> tuple[list[Tensor], Optimizer]:
        params = [nn.Parameter(each[rows].clone()) for each in self._normal(0)]
        optimizer = self._build(params)
        for step in range(self.steps):
            if self.lr_scale_after and step == self.lr_scale_after[0]:
                for group in optimizer.param_groups:
                    group["lr"] = self.lr_scale_after[1] * group["lr"]
            pairs = zip(self._normal(1), self._normal(2 + step), strict=True)
            for param, (direction, noise) in zip(params, pairs, strict=True):
                param.grad = 0.1 * self.gradient_scale * (direction + noise)[rows]
            seed_all(step)
            if self.loss:
                loss = torch.tensor(self.loss(step))
                optimizer.step(lambda loss=loss: loss)  # pyright: ignore
            else:
                optimizer.step()
            if step + 1 == self.resume_after:
                stream = io.BytesIO()
                torch.save(optimizer.state_dict(), stream)
                stream.seek(0)
                params = [nn.Parameter(param.detach().clone()) for param in params]
                optimizer = self._build(params)
                optimizer.load_state_dict(torch.load(stream, weights_only=True))
        return [param.detach() for param in params], optimizer

    def _roles(self) -> list[Role]:
        return [role for role in SHAPES if self.third.holds(role)]

    def _normal(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(SHAPES[role], generator=generator) for role in self._roles()]

    def _build(self, params: list[nn.Parameter]) -> Optimizer:
        numbers = {"lr": self.third.default_lr, "weight_decay": self.weight_decay}
        roles = zip(params, self._roles(), strict=True)
        return self.third.build([{"params": [p], "role": role, **numbers} for p, role in roles])


@contextmanager
def _kept_generators() -> Iterator[None]:
    """Give torch's generator of the CPU, Python's and NumPy's the states back that they had."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy and numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            if numpy and states[1]:
                numpy.random.set_state(states[1])


def _constant_loss(step: int) -> float:
    return 1.0


def _rising_loss(step: int) -> float:
    return 1.0 + step


def _effect(third: ThirdParty, **changes: Any) -> float:
    """Return how much a change alters weights after many steps, relative to their movement."""
    first = _Run(third, steps=0).weights()
    usual, changed = (_Run(third, steps=MANY, **each).weights() for each in ({}, changes))
    return max(
        float((b - a).abs().max() / (a - w).abs().max().clamp_min(1e-30))
        for w, a, b in zip(first, usual, changed, strict=True)
    )


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _line(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
