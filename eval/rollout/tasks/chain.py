"""Compute sums with one right answer: x <- (a x + b) mod m for a given start x and increment b.

This task checks identities and cannot measure test-time feedback. Because only one answer is right,
the exact match of sampled rollouts is E[exp(-Σ NLL)] on the data, and the exact match of greedy
rollouts says whether all decisions are right on the data's contexts.
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
    """A document is x, b and then `horizon` values. The instance determines the multiplier a."""

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
    """n sums. The prompt alone determines the right answers; mistakes do not change them."""

    def __init__(self, prompts: Tensor, multiplier: int, modulus: int) -> None:
        self.prompts = prompts
        self.multiplier, self.modulus = multiplier, modulus
        start, self.increment = prompts.unbind(1)
        self.answer = self._after(start)  # (B,) the right next token
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
        """Return exact_match: 1 if every decision was right, else 0."""
        return {"exact_match": self.correct.double()}

    def _after(self, value: Tensor) -> Tensor:
        return (self.multiplier * value + self.increment) % self.modulus
