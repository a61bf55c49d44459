"""Predict tokens without a trained model, to show how good or bad a model can be.

oracle      the source itself; its rollouts are the data's
greedy      always the source's likeliest token: no imitation, but no accidents either
uniform     every token equally likely, whatever came before
"""

import math
from copy import deepcopy

import torch
from torch import Tensor

from eval.rollout.environment import Environment
from eval.rollout.policy import Predictor


class OraclePredictor(Predictor):
    """Predict what the oracle predicts, by playing the episodes in a copy of the environment.

    The tokens that are read must be those that the copy answers.

    Args:
        environment: the environment that grades, at its beginning. It is not changed.
    """

    def __init__(self, environment: Environment) -> None:
        self.environment = environment

    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        self.copy = deepcopy(self.environment)
        assert prompts.equal(self.copy.prompts)
        return self.copy.oracle().log()

    def read(self, tokens: Tensor) -> Tensor:  # (B, 1 + k): a decision and the answer to it
        assert tokens[:, 1:].equal(self.copy.step(tokens[:, 0]))
        return self.copy.oracle().log()


class GreedyPredictor(Predictor):
    """Give all probability to the likeliest token of another predictor."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        return self._likeliest(self.predictor.start(prompts))

    def read(self, tokens: Tensor) -> Tensor:
        return self._likeliest(self.predictor.read(tokens))

    def _likeliest(self, log_p: Tensor) -> Tensor:  # (B, V) -> (B, V)
        impossible = torch.full_like(log_p, -math.inf)
        return impossible.scatter_(1, log_p.argmax(1, keepdim=True), 0.0)


class UniformPredictor(Predictor):
    """Give each of `n_vocab` tokens the same probability."""

    def __init__(self, n_vocab: int) -> None:
        self.n_vocab = n_vocab

    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        return self.read(prompts)

    def read(self, tokens: Tensor) -> Tensor:
        shape = len(tokens), self.n_vocab
        return torch.full(shape, -math.log(self.n_vocab), dtype=torch.float64)


def reference(name: str, environment: Environment) -> Predictor:
    """Return the reference policy "oracle", "greedy" or "uniform".

    environment: the environment that grades, at its beginning. It is not changed.
    """
    oracle = OraclePredictor(environment)
    uniform = UniformPredictor(environment.oracle().size(1))
    return {"oracle": oracle, "greedy": GreedyPredictor(oracle), "uniform": uniform}[name]
