"""A random probabilistic automaton: the exact law of the next token after every history.

In each state three likely symbols share 99 % of the mass, with weights from Dirichlet(2, 2, 2), and
all other tokens share 1 % evenly, end-of-text among them. Every symbol leads to a random state,
end-of-text, which also starts a document, to the initial one. An episode never ends.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from eval.rollout.environment import Environment
from eval.rollout.tasks.task import OracleTask, TaskError

LIKELY = 3  # symbols a state
UNLIKELY_MASS = 0.01  # of all other tokens of a state together
DRAWS = 1000  # of random transitions, until all states are reachable


@dataclass(frozen=True)
class Automaton:
    """S states over V tokens; state 0 is the initial one, end-of-text the last token."""

    p: Tensor  # (S, V) float64, the law of the next token
    likely: Tensor  # (S, V) bool
    target: Tensor  # (S, V) int64, the state that each token leads to


@dataclass(frozen=True, kw_only=True)
class Pdfa(OracleTask):
    """Next-token prediction in the language of a random automaton."""

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
        _ = self.automaton  # or raises

    def symbols(self) -> list[str]:
        return [str(i) for i in range(self.alphabet)]

    def environment(self, n: int, seed: str | int) -> "PdfaEnvironment":
        """Every episode begins in the initial state, so `seed` changes nothing before decisions."""
        return PdfaEnvironment(self.automaton, n)

    @cached_property
    def automaton(self) -> Automaton:
        """Drawn from the instance, again and again until all states are reachable."""
        generator = self.generator("automaton")
        p, likely = _laws(self.states, self.alphabet, generator)
        for _ in range(DRAWS):
            target = torch.randint(self.states, p.shape, generator=generator)
            target[:, -1] = 0
            if _reachable(target).all():
                return Automaton(p, likely, target)
        raise TaskError(
            f"task pdfa: states={self.states} are not all reachable with alphabet={self.alphabet} "
            f"in any of {DRAWS} random automata; use fewer states or a larger alphabet"
        )


class PdfaEnvironment(Environment):
    """n walks through one automaton."""

    def __init__(self, automaton: Automaton, n: int) -> None:
        self.automaton = automaton
        self.prompts = torch.full((n, 1), automaton.p.size(1) - 1)
        self.state = torch.zeros(n, dtype=torch.int64)
        self.unlikely = torch.zeros(n, dtype=torch.float64)  # tokens so far
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
        """unlikely_share: the share of decisions that were none of their state's likely symbols."""
        return {"unlikely_share": self.unlikely / self.decisions}


def _laws(states: int, alphabet: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Distributions (S, V) float64, and which of their tokens are likely, (S, V) bool."""
    V = alphabet + 1
    order = torch.rand(states, alphabet, generator=generator).argsort(1)
    chosen = order[:, :LIKELY]  # (S, 3), end-of-text is never among them
    u = torch.rand(states, LIKELY, 2, generator=generator, dtype=torch.float64)
    weights = -torch.log1p(-u).sum(-1)  # Gamma(2): normalised, Dirichlet(2, 2, 2)
    weights = (1 - UNLIKELY_MASS) * weights / weights.sum(1, keepdim=True)
    p = torch.full((states, V), UNLIKELY_MASS / (V - LIKELY), dtype=torch.float64)
    likely = torch.zeros(states, V, dtype=torch.bool).scatter_(1, chosen, True)
    return p.scatter_(1, chosen, weights), likely


def _reachable(target: Tensor) -> Tensor:  # (S, V) -> (S,) bool
    """The states that some sequence of tokens leads to from the initial one."""
    reached = torch.zeros(len(target), dtype=torch.bool)
    reached[0] = True
    while True:
        more = reached.clone()
        more[target[reached]] = True
        if more.equal(reached):
            return reached
        reached = more
