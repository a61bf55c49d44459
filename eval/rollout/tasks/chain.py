"""Arithmetic with one right answer: x <- (a x + b) mod m, from a start x and an increment b.

It cannot measure test-time feedback, and shows why: with one right answer, sampled exact match is
E[exp(-Σ NLL)] on the data, and greedy exact match is whether all decisions are right on the data.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from eval.rollout.environment import Environment
from eval.rollout.tasks.task import OracleTask


@dataclass(frozen=True, kw_only=True)
class Chain(OracleTask):
    """The multiplier a is the instance's; a document is x, b, then `horizon` values."""

    horizon: int = 8
    modulus: int = 16

    name: ClassVar[str] = "chain"
    primary: ClassVar[str] = "exact_match"
    higher_is_better: ClassVar[bool] = True
    prompt_tokens: ClassVar[int] = 2

    def claims(self) -> dict[str, bool]:
        in_range = 3 <= self.modulus <= 4096
        return super().claims() | {f"modulus={self.modulus}: must be 3 to 4096": in_range}

    def symbols(self) -> list[str]:
        return [str(i) for i in range(self.modulus)]

    @cached_property
    def multiplier(self) -> int:
        return int(torch.randint(2, self.modulus, (), generator=self.generator("multiplier")))

    def environment(self, n: int, seed: str | int) -> "ChainEnvironment":
        prompts = torch.randint(self.modulus, (n, 2), generator=self.generator(seed, "prompts"))
        return ChainEnvironment(prompts, self.multiplier, self.modulus)


class ChainEnvironment(Environment):
    """n sums. The answer is fixed by the prompt: it goes on as if no mistake had been made."""

    def __init__(self, prompts: Tensor, multiplier: int, modulus: int) -> None:
        self.prompts = prompts
        self.multiplier, self.modulus = multiplier, modulus
        start, self.increment = prompts.unbind(1)
        self.answer = self._after(start)  # (B,) the next right token
        self.correct = torch.ones(len(prompts), dtype=torch.bool)

    def oracle(self) -> Tensor:
        return one_hot(self.answer, self.modulus + 1).double()

    def step(self, tokens: Tensor) -> Tensor:
        self.correct &= tokens == self.answer
        self.answer = self._after(self.answer)
        return tokens.new_empty(len(tokens), 0)

    def has_ended(self) -> Tensor:
        return torch.zeros_like(self.correct)

    def outcomes(self) -> dict[str, Tensor]:
        """exact_match: 1 if every decision was right, else 0."""
        return {"exact_match": self.correct.double()}

    def _after(self, value: Tensor) -> Tensor:
        return (self.multiplier * value + self.increment) % self.modulus
