"""Predictors that deviate from the oracle in a known way, and helpers to run them."""

from collections.abc import Callable

import torch
from torch import Tensor

from eval.rollout.environment import Rollout, rollout
from eval.rollout.policy import Predictor
from eval.rollout.tasks.task import OracleTask
from model import GPT, GPTConfig


class Bent(Predictor):
    """Apply a function of (B, V) float64 to the probabilities of another predictor."""

    def __init__(self, predictor: Predictor, bend: Callable[[Tensor], Tensor]) -> None:
        self.predictor = predictor
        self.bend = bend

    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        return self.bend(self.predictor.start(prompts).exp()).log()

    def read(self, tokens: Tensor) -> Tensor:
        return self.bend(self.predictor.read(tokens).exp()).log()


class Product(Predictor):
    """Multiply the probabilities of two predictors, the second raised to `power`, and normalise.

    The result is near the first predictor, with errors that depend on the whole context.
    """

    def __init__(self, first: Predictor, second: Predictor, power: float) -> None:
        self.parts = first, second
        self.power = power

    def _join(self, first: Tensor, second: Tensor) -> Tensor:
        return (first + self.power * second).log_softmax(-1)

    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        first, second = (part.start(prompts) for part in self.parts)
        return self._join(first, second)

    def read(self, tokens: Tensor) -> Tensor:
        first, second = (part.read(tokens) for part in self.parts)
        return self._join(first, second)


def smoothed(p: Tensor, share: float = 0.1) -> Tensor:
    """Spread a share of the mass evenly over all tokens."""
    return (1 - share) * p + share / p.size(-1)


def both_rollouts(
    task: OracleTask, predictor: Predictor, *, n: int, seed: int
) -> tuple[Rollout, Rollout]:
    """Roll out on the data's contexts and on the model's own, as `task.grade` does."""
    uniforms = task.uniforms(n, seed)
    data = rollout(task.environment(n, seed), predictor, uniforms, "oracle")
    own = rollout(task.environment(n, seed), predictor, uniforms, "model")
    return data, own


def random_gpt(task: OracleTask, seed: int = 0) -> GPT:
    """Build an untrained GPT whose context fits an episode of the task."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": len(task.symbols()) + 1, "block_size": task.context_tokens}
    return GPT(GPTConfig(**sizes, n_layer=2, n_head=2, n_embd=32)).eval()
