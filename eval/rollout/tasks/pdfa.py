"""Predict the language of a random probabilistic deterministic finite automaton (PDFA).

The distribution of the next token is known exactly after every history. In each state, three likely
symbols share 99 % of the probability with weights from Dirichlet(2, 2, 2), and all other tokens,
including end-of-text, share 1 % evenly. Every symbol leads to a random state. End-of-text, which is
also the first token of a document, leads to the initial state, and does not end an episode.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from eval.rollout.environment import Environment
from eval.rollout.tasks.task import OracleTask, TaskError

LIKELY = 3  # number of likely symbols in a state
UNLIKELY_MASS = 0.01  # total probability of all other tokens in a state
DRAWS = 1000  # attempts to draw transitions that make all states reachable


@dataclass(frozen=True)
class Automaton:
    """S states over V tokens. State 0 is the initial state, and the last token is end-of-text."""

    p: Tensor  # (S, V) float64, the distribution of the next token
    likely: Tensor  # (S, V) bool
    target: Tensor  # (S, V) int64, the state that each token leads to


@dataclass(frozen=True, kw_only=True)
class Pdfa(OracleTask):
    """Predict the next token in the language of a random automaton."""

    states: int = 16
    alphabet: int = 10  # symbols besides end-of-text

    name: ClassVar[str] = "pdfa"
    primary: ClassVar[str] = "jeffreys"

    def claims(self) -> dict[str, bool]:
        S, A = self.states, self.alphabet
        return super().claims() | {
            f"states={S}: must be 2 to 1024": 2 <= S <= 1024,
            f"alphabet={A}: must be {LIKELY} to 1024": LIKELY <= A <= 1024,
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.automaton  # raises TaskError if no automaton is found

    def symbols(self) -> list[str]:
        return [str(i) for i in range(self.alphabet)]

    def environment(self, n: int, seed: str | int) -> "PdfaEnvironment":
        """Create n episodes. All begin in the initial state, so `seed` has no effect."""
        return PdfaEnvironment(self.automaton, n)

    @cached_property
    def automaton(self) -> Automaton:
        """The automaton of the instance, drawn again until all states are reachable.

        Raises:
            TaskError: `DRAWS` attempts failed.
        """
        generator = self.generator("automaton")
        p, likely = _draw_distributions(self.states, self.alphabet, generator)
        for _ in range(DRAWS):
            target = torch.randint(self.states, p.shape, generator=generator)
            target[:, -1] = 0
            if _reachable(target).all():
                return Automaton(p, likely, target)
        raise TaskError(
            f"task pdfa: {DRAWS} random automata with states={self.states} and "
            f"alphabet={self.alphabet} all have unreachable states; "
            "use fewer states or a larger alphabet"
        )


class PdfaEnvironment(Environment):
    """n walks through one automaton."""

    def __init__(self, automaton: Automaton, n: int) -> None:
        self.automaton = automaton
        self.prompts = torch.full((n, 1), automaton.p.size(1) - 1)
        self.state = torch.zeros(n, dtype=torch.int64)
        self.unlikely = torch.zeros(n, dtype=torch.float64)  # number of unlikely tokens so far
        self.decisions = 0

    def oracle(self) -> Tensor:
        return self.automaton.p[self.state]

    def step(self, tokens: Tensor) -> Tensor:
        self.unlikely += ~self.automaton.likely[self.state, tokens]
        self.state = self.automaton.target[self.state, tokens]
        self.decisions += 1
        return tokens.new_empty(len(tokens), 0)

    def has_ended(self) -> Tensor:
        return torch.zeros_like(self.state, dtype=torch.bool)

    def outcomes(self) -> dict[str, Tensor]:
        """Return unlikely_share: the share of decisions that are unlikely in their state."""
        return {"unlikely_share": self.unlikely / self.decisions}


def _draw_distributions(
    states: int, alphabet: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw the distributions (S, V) float64 and mark their likely tokens (S, V) bool."""
    V = alphabet + 1
    order = torch.rand(states, alphabet, generator=generator).argsort(1)
    chosen = order[:, :LIKELY]  # (S, 3), never end-of-text
    u = torch.rand(states, LIKELY, 2, generator=generator, dtype=torch.float64)
    weights = -torch.log1p(-u).sum(-1)  # Gamma(2); normalised they follow Dirichlet(2, 2, 2)
    weights = (1 - UNLIKELY_MASS) * weights / weights.sum(1, keepdim=True)
    p = torch.full((states, V), UNLIKELY_MASS / (V - LIKELY), dtype=torch.float64)
    likely = torch.zeros(states, V, dtype=torch.bool).scatter_(1, chosen, True)
    return p.scatter_(1, chosen, weights), likely


def _reachable(target: Tensor) -> Tensor:  # (S, V) -> (S,) bool
    """Mark the states that are reachable from the initial state."""
    reached = torch.zeros(len(target), dtype=torch.bool)
    reached[0] = True
    while True:
        more = reached.clone()
        more[target[reached]] = True
        if more.equal(reached):
            return reached
        reached = more
