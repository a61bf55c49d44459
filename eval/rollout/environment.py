"""Episodes with an exact oracle, and the one loop that runs them: on the data's contexts (the
oracle acts) or on the model's own (the model acts), with common random numbers.

Because both use the same uniform numbers for the same decisions, a model that equals the oracle
lives through the very same episodes, and its test-time feedback gap is zero, not zero on average.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from eval.rollout.policy import Predictor

Actor = Literal["oracle", "model"]
ROWS = 8  # of probabilities that `decide` works on at once: they stay in the processor's cache


class Environment(ABC):
    """B episodes under way. All randomness that is not a decision is drawn at the beginning."""

    prompts: Tensor  # (B, P) int64: what is given before the first decision
    can_end: ClassVar[bool] = False  # whether an episode may end before its horizon

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
    """B episodes of H decisions; NaN where an episode had ended before.

    alive: episodes under way after each decision; None in a world where no episode ends.
    """

    tokens: Tensor  # (B, H) int64, the decisions
    error: Tensor  # (B, H) q = KL(oracle ‖ model) before each decision, nats
    reverse: Tensor  # (B, H) KL(model ‖ oracle), nats; inf where the oracle rules a token out
    nll: Tensor  # (B, H) -log p_model(decision), nats
    entropy: Tensor  # (B, H) of the model's distribution, nats
    outcomes: dict[str, Tensor]  # (B,) each
    alive: Tensor | None = None  # (B, H) bool


@torch.no_grad()
def rollout(
    environment: Environment, predictor: Predictor, uniforms: Tensor, actor: Actor
) -> Rollout:
    """H decisions in every episode, taken by the oracle or by the model, untruncated at T = 1.

    uniforms: (B, H) float64 in [0, 1), one a decision.
    """
    columns: list[tuple[Tensor, ...]] = []
    alive: list[Tensor] = []
    answer = environment.prompts
    log_p = predictor.start(answer).cpu()
    for t, u in enumerate(uniforms.unbind(1)):
        if t > 0:
            log_p = predictor.read(answer).cpu()  # (B, V)
        q, p = environment.oracle(), log_p.exp()
        token = draw(q if actor == "oracle" else p, u)  # (B,)
        nll = -log_p.gather(1, token[:, None])[:, 0]
        entropy = torch.special.entr(p).sum(-1)
        graded = torch.stack([kl(q, log_p), kl(p, q.log()), nll, entropy])  # (4, B)
        columns.append((token, graded.masked_fill(environment.has_ended(), torch.nan)))
        answer = torch.cat([token[:, None], environment.step(token)], dim=1)
        alive.append(~environment.has_ended())
    tokens = torch.stack([token for token, _ in columns], dim=1)
    error, reverse, nll, entropy = torch.stack([graded for _, graded in columns], dim=2)
    under_way = torch.stack(alive, dim=1) if environment.can_end else None
    return Rollout(tokens, error, reverse, nll, entropy, environment.outcomes(), under_way)


def decide(log_p: Tensor, choice: Tensor) -> tuple[Tensor, ...]:
    """Token, its -log p, and the entropy in nats, (B,) each, on the CPU.

    log_p (B, V), on any device, where all work is done. choice (B,): the tokens (int64), or the
    uniform numbers that draw them (float64).
    """
    parts = zip(log_p.split(ROWS), choice.to(log_p.device).split(ROWS), strict=True)
    columns = zip(*(_decide(*part) for part in parts), strict=True)
    return tuple(torch.cat(column).cpu() for column in columns)


def _decide(log_p: Tensor, choice: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = log_p.exp()  # (b, V)
    token = draw(p, choice) if choice.is_floating_point() else choice
    nll = -log_p.gather(1, token[:, None])[:, 0]
    return token, nll, -torch.where(p > 0, p * log_p, 0.0).sum(-1)


def draw(p: Tensor, uniforms: Tensor) -> Tensor:  # (B, V), (B,) -> (B,)
    """Tokens by inversion: the first whose cumulative probability exceeds u."""
    cdf = p.cumsum(-1)
    return torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)[:, 0]


def kl(q: Tensor, log_p: Tensor) -> Tensor:  # (B, V), (B, V) -> (B,)
    """KL(q ‖ p) = Σ q log(q / p) in nats, where 0 log 0 = 0."""
    return torch.where(q > 0, q * (q.log() - log_p), 0.0).sum(-1)
