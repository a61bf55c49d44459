"""Simulate episodes with a known next-token distribution, the oracle, and roll models out in them.

`rollout` runs B episodes. Either the oracle draws the tokens, which gives the data's contexts, or
the model draws them, which gives the model's own contexts. Both use the same uniform random number
for the same decision (common random numbers). A model that equals the oracle therefore produces
exactly the same episodes, and its test-time feedback gap is exactly zero, not just on average.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from eval.rollout.policy import Predictor

Actor = Literal["oracle", "model"]
ROWS = 8  # rows that `decide` processes at once, few enough for the processor's cache


class Environment(ABC):
    """The state of B episodes that run in parallel.

    All randomness except the decisions is drawn when the environment is constructed.
    """

    prompts: Tensor  # (B, P) int64, the tokens before the first decision
    can_end: ClassVar[bool] = False  # whether an episode can end before the horizon

    @abstractmethod
    def oracle(self) -> Tensor:  # (B, V) float64
        """Return the true distribution of each episode's next token, given its current state."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:  # (B,) int64 -> (B, k) int64
        """Apply one decision per episode and return the environment's answer of k >= 0 tokens."""

    @abstractmethod
    def has_ended(self) -> Tensor:  # (B,) bool
        """Return which episodes have ended. Further decisions in them are not graded."""

    @abstractmethod
    def outcomes(self) -> dict[str, Tensor]:  # (B,) float64 each
        """Return a score per episode for each outcome, after the last decision. May be empty."""


@dataclass(frozen=True)
class Rollout:
    """The decisions and measurements of B episodes with H decisions each.

    The measurements compare the model with the oracle just before each decision. They are NaN for
    decisions after the end of an episode.
    """

    tokens: Tensor  # (B, H) int64, the decisions
    error: Tensor  # (B, H) KL(oracle ‖ model), nats
    reverse: Tensor  # (B, H) KL(model ‖ oracle), nats; inf if the oracle excludes a possible token
    nll: Tensor  # (B, H) -log p_model(decision), nats
    entropy: Tensor  # (B, H) entropy of the model's distribution, nats
    outcomes: dict[str, Tensor]  # (B,) each
    # (B, H) bool: whether an episode still runs after each decision; None if none can end early.
    alive: Tensor | None = None


@torch.no_grad()
def rollout(
    environment: Environment,
    predictor: Predictor,
    uniforms: Tensor,
    actor: Actor,
    context_tokens: int | None = None,
) -> Rollout:
    """Run every episode for H decisions.

    Args:
        environment: the episodes at their beginning.
        predictor: the model that is measured.
        uniforms: (B, H) float64 in [0, 1), one random number per decision.
        actor: whose distribution the decisions are drawn from, at temperature 1 and untruncated.
        context_tokens: the tokens of an episode that the model reads. By default, the predictor
            keeps memory for as many as the model can read.
    """
    columns: list[tuple[Tensor, ...]] = []
    alive: list[Tensor] = []
    answer = environment.prompts
    log_p = predictor.start(answer, context_tokens).cpu()
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
    """Draw or look up one token per row.

    Args:
        log_p: (B, V) log-probabilities on any device, on which all computation happens.
        choice: (B,) the tokens (int64), or the uniform numbers to draw them with (float64).
    Returns:
        The tokens, their -log p and the entropies in nats, (B,) each, on the CPU.
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
    """Draw from each row by inversion: take the first token with cumulative probability > u."""
    cdf = p.cumsum(-1)
    return torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)[:, 0]


def kl(q: Tensor, log_p: Tensor) -> Tensor:  # (B, V), (B, V) -> (B,)
    """Compute KL(q ‖ p) = Σ q log(q / p) in nats, with 0 log 0 = 0."""
    return torch.where(q > 0, q * (q.log() - log_p), 0.0).sum(-1)
