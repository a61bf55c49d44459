"""Finding the way through a fixed random digraph that a model must learn by heart.

A document is the goal, the start, the further nodes of a uniformly random shortest path (the last
is the goal), end-of-text, padding. A node has one token, as goal and as place. Many answers are
right, and every wrong node has a way on. Held-out (start, goal) pairs never begin a document of
"train"; about half of them occur there in the middle of a path, as a node and its goal.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from eval.tasks.task import OracleTask, TaskError
from eval.world import World

HELD_OUT = 0.1  # of all pairs; every stream of episodes but "train" consists of them
SLACK = 4  # decisions beyond the longest shortest path and its end, to recover from mistakes


@dataclass(frozen=True)
class Graph:
    """N nodes of out-degree D, strongly connected; who is how far from whom."""

    successors: Tensor  # (N, D) int64
    distance: Tensor  # (N, N) int64, moves from row to column
    paths: Tensor  # (N, N) float64, number of shortest paths from row to column


@dataclass(frozen=True, kw_only=True)
class Nav(OracleTask):
    """Shortest paths between held-out pairs of nodes."""

    horizon: int = 24
    nodes: int = 128
    degree: int = 3  # edges that leave a node

    name: ClassVar[str] = "nav"
    primary: ClassVar[str] = "success"
    higher_is_better: ClassVar[bool] = True
    prompt_tokens: ClassVar[int] = 2

    def claims(self) -> dict[str, bool]:
        return super().claims() | {
            f"nodes={self.nodes}: must be 4 to 1024": 4 <= self.nodes <= 1024,
            f"degree={self.degree}: must be 2 to {self.nodes - 1}": 2 <= self.degree < self.nodes,
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        moves = int(self.graph.distance.max())
        if self.horizon < (wanted := moves + 1 + SLACK):
            raise TaskError(
                f"task nav: horizon={self.horizon}, but shortest paths take up to {moves} moves, "
                f"then the end and {SLACK} for mistakes; use horizon={wanted} or a larger degree"
            )

    def symbols(self) -> list[str]:
        return [*map(str, range(self.nodes)), "pad"]

    def unscored(self) -> list[int]:
        return [self.nodes]

    def world(self, n: int, seed: str | int) -> "NavWorld":
        pairs = self.pairs[seed != "train"]
        chosen = torch.randint(len(pairs), (n,), generator=self.generator(seed, "pairs"))
        return NavWorld(self.graph, *pairs[chosen].unbind(1))

    @cached_property
    def graph(self) -> Graph:
        successors = _random_digraph(self.nodes, self.degree, self.generator("graph"))
        return Graph(successors, *_shortest_paths(successors))

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:  # (n, 2) each
        """(start, goal) for training, and held out."""
        pairs = (~torch.eye(self.nodes, dtype=torch.bool)).nonzero()
        pairs = pairs[torch.randperm(len(pairs), generator=self.generator("pairs"))]
        n = int(HELD_OUT * len(pairs))
        return pairs[n:], pairs[:n]


class NavWorld(World):
    """Walks from start to goal. The first token that is no node ends an episode."""

    def __init__(self, graph: Graph, start: Tensor, goal: Tensor) -> None:
        self.graph, self.node, self.goal = graph, start, goal
        self.prompts = torch.stack([goal, start], dim=1)
        self.shortest = graph.distance[start, goal] + 1  # decisions, the end included
        self.pad = len(graph.successors)
        self.end = self.pad + 1  # end-of-text
        self.ended = torch.zeros_like(start, dtype=torch.bool)
        self.decisions, self.legal = torch.zeros(2, len(start), dtype=torch.int64)

    def oracle(self) -> Tensor:
        """From any node, the next one of a uniformly random shortest path; at the goal, the end."""
        graph, goal = self.graph, self.goal[:, None]
        onward = graph.successors[self.node]  # (B, D)
        closer = graph.distance[onward, goal] < graph.distance[self.node, self.goal][:, None]
        share = graph.paths[onward, goal] / graph.paths[self.node, self.goal][:, None]  # (B, D)
        p = share.new_zeros(len(share), self.end + 1)
        p.scatter_(1, onward, share * (closer & ~self.ended[:, None]))
        p[:, self.end] = (self.node == self.goal) & ~self.ended
        p[:, self.pad] = self.ended
        return p

    def step(self, tokens: Tensor) -> Tensor:
        legal = (self.graph.successors[self.node] == tokens[:, None]).any(1)
        legal |= (self.node == self.goal) & (tokens == self.end)
        self.decisions += ~self.ended
        self.legal += legal & ~self.ended
        self.ended = self.ended | (tokens >= self.pad)
        self.node = torch.where(self.ended, self.node, tokens)
        return tokens.new_empty(len(tokens), 0)

    def has_ended(self) -> Tensor:
        return self.ended

    def outcomes(self) -> dict[str, Tensor]:
        """success: edges only, then the end at the goal; optimality: that in the fewest moves.
        legality: the share of decisions that follow an edge, or give the end at the goal.
        """
        success = self.ended & (self.legal == self.decisions)
        optimal = success & (self.decisions == self.shortest)
        legality = self.legal / self.decisions.double()
        return {"success": success.double(), "legality": legality, "optimality": optimal.double()}


def _random_digraph(nodes: int, degree: int, generator: torch.Generator) -> Tensor:  # (N, D) int64
    """Successors of each node: one on a random cycle through all nodes, the others at random."""
    cycle = torch.randperm(nodes, generator=generator)
    score = torch.rand(nodes, nodes, generator=generator).fill_diagonal_(-1)
    score[cycle, cycle.roll(-1)] = 2
    return score.topk(degree).indices


def _shortest_paths(successors: Tensor) -> tuple[Tensor, Tensor]:  # (N, N) int64, (N, N) float64
    """Moves from every node to every other, and the number of shortest paths."""
    N = len(successors)
    edges = torch.zeros(N, N, dtype=torch.float64).scatter_(1, successors, 1)
    ways = torch.eye(N, dtype=torch.float64)  # shortest paths of exactly `moves` moves
    distance, paths, moves = torch.full((N, N), N).fill_diagonal_(0), ways, 0
    while ways.any():
        moves += 1
        ways = (edges @ ways) * (distance == N)
        distance[ways > 0] = moves
        paths = paths + ways
    return distance, paths
