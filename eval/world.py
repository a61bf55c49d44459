"""Episodes with an exact oracle, and the one loop that runs them: on the data's contexts (the
oracle acts) or on the model's own (the model acts), with common random numbers.

Because both use the same uniform numbers for the same decisions, a model that equals the oracle
lives through the very same episodes, and its test-time feedback gap is zero, not zero on average.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eval.predictor import Predictor

Actor = Literal["oracle", "model"]


class World(ABC):
    """B episodes under way. All randomness that is not a decision is drawn at the beginning."""

    prompts: Tensor  # (B, P) int64: what is given before the first decision

    @abstractmethod
    def oracle(self) -> Tensor:  # (B, V) float64
        """The true distribution of the next token of every episode, whatever led to its state."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:  # (B,) int64 -> (B, k) int64
        """Take a decision in every episode; returns the world's answer of k tokens (k may be 0)."""

    @abstractmethod
    def has_ended(self) -> Tensor:  # (B,) bool
        """Episodes in which nothing is left to decide: their decisions are not graded."""

    @abstractmethod
    def outcomes(self) -> dict[str, Tensor]:  # (B,) float64 each
        """How every episode went, once all decisions are taken; may be empty."""


@dataclass(frozen=True)
class Rollout:
    """B episodes of H decisions; NaN where an episode had ended before."""

    tokens: Tensor  # (B, H) int64, the decisions
    error: Tensor  # (B, H) q = KL(oracle ‖ model) before each decision, nats
    nll: Tensor  # (B, H) -log p_model(decision), nats
    entropy: Tensor  # (B, H) of the model's distribution, nats
    outcomes: dict[str, Tensor]  # (B,) each


@torch.no_grad()
def rollout(world: World, predictor: Predictor, uniforms: Tensor, actor: Actor) -> Rollout:
    """H decisions in every episode, taken by the oracle or by the model, untruncated at T = 1.

    uniforms: (B, H) float64 in [0, 1), one a decision.
    """
    columns: list[tuple[Tensor, ...]] = []
    answer = world.prompts
    log_p = predictor.start(answer)
    for t, u in enumerate(uniforms.unbind(1)):
        if t > 0:
            log_p = predictor.read(answer)  # (B, V)
        q, p = world.oracle(), log_p.exp()
        token = draw(q if actor == "oracle" else p, u)  # (B,)
        nll = -log_p.gather(1, token[:, None])[:, 0]
        graded = torch.stack([kl(q, log_p), nll, torch.special.entr(p).sum(-1)])  # (3, B)
        columns.append((token, graded.masked_fill(world.has_ended(), torch.nan)))
        answer = torch.cat([token[:, None], world.step(token)], dim=1)
    tokens = torch.stack([token for token, _ in columns], dim=1)
    error, nll, entropy = torch.stack([graded for _, graded in columns], dim=2)
    return Rollout(tokens, error, nll, entropy, world.outcomes())


def draw(p: Tensor, uniforms: Tensor) -> Tensor:  # (B, V), (B,) -> (B,)
    """Tokens by inversion: the first whose cumulative probability exceeds u."""
    cdf = p.cumsum(-1)
    return torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)[:, 0]


def kl(q: Tensor, log_p: Tensor) -> Tensor:  # (B, V), (B, V) -> (B,)
    """KL(q ‖ p) = Σ q log(q / p) in nats, where 0 log 0 = 0."""
    return torch.where(q > 0, q * (q.log() - log_p), 0.0).sum(-1)
