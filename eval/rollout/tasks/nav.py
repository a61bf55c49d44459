"""Navigate to one goal after another in a fixed random directed graph that the model must memorise.

A document is a start node, the first goal, and then alternating decisions and answers. A decision
names the next node. The answer is "on", or the next goal once the current goal is reached, so the
model must remember the current goal. Every shortest path is right, so often several decisions are.
A wrong edge costs time, but the goal stays reachable. A token that is not an edge ends the episode.

Some pairs (node, goal) are held out from training. If a pair is held out, so are all pairs with the
same goal from which a shortest path passes through it. Documents of the split "train" therefore
never contain a held-out pair. In all other documents, every journey to a goal starts at one.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from eval.rollout.environment import Environment, draw
from eval.rollout.tasks.task import OracleTask, TaskError

HELD_OUT = 0.1  # largest share of nodes that are held out for a goal


@dataclass(frozen=True)
class Graph:
    """A strongly connected graph of N nodes with out-degree D, and its shortest paths."""

    successors: Tensor  # (N, D) int64
    distance: Tensor  # (N, N) int64, number of moves from row to column
    paths: Tensor  # (N, N) float64, number of shortest paths from row to column


@dataclass(frozen=True, kw_only=True)
class Nav(OracleTask):
    """Follow shortest paths between held-out pairs of nodes, one after another."""

    horizon: int = 24
    nodes: int = 32
    degree: int = 4  # outgoing edges per node

    name: ClassVar[str] = "nav"
    primary: ClassVar[str] = "success"
    higher_is_better: ClassVar[bool] = True
    prompt_tokens: ClassVar[int] = 2
    answer_tokens: ClassVar[int] = 1

    def claims(self) -> dict[str, bool]:
        return super().claims() | {
            f"nodes={self.nodes}: must be 16 to 1024": 16 <= self.nodes <= 1024,
            f"degree={self.degree}: must be 2 to {self.nodes - 1}": 2 <= self.degree < self.nodes,
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        moves = int(self.graph.distance.max())
        if self.horizon < moves:
            raise TaskError(
                f"task nav: horizon={self.horizon}, but shortest paths take up to {moves} moves, "
                f"so an episode might reach no goal; use horizon={moves} or a larger degree"
            )
        goals = self.held_out.sum(1)  # (N,)
        if n := int(((goals == 0) | (goals == self.nodes - 1)).sum()):
            raise TaskError(
                f"task nav: nodes={self.nodes} are too few: {n} nodes have no held-out goals or "
                "only held-out goals; use more nodes"
            )

    def symbols(self) -> list[str]:
        places = [str(i) for i in range(self.nodes)]
        return [*places, *(f"to{place}" for place in places), "on"]

    def unscored(self) -> list[int]:
        return list(range(self.nodes, 2 * self.nodes + 1))

    def environment(self, n: int, seed: str | int) -> "NavEnvironment":
        """Create n episodes with random starts and as many goals as could be reached.

        Each goal is drawn from the goals allowed at the previous one: those that are not held out
        for the split "train" and for streams whose names begin with it, and the held-out ones
        otherwise.
        """
        is_training = str(seed).startswith("train")
        allowed = ~self.held_out & (self.graph.distance > 0) if is_training else self.held_out
        weights = allowed.double()  # (N, N)
        size, generator = (n, self.horizon + 2), self.generator(seed, "stops")
        first, *rest = torch.rand(size, generator=generator, dtype=torch.float64).unbind(1)
        stops = [(first * self.nodes).long()]
        for u in rest:
            stops.append(draw(weights[stops[-1]], u))
        return NavEnvironment(self.graph, self.held_out, torch.stack(stops, dim=1))

    @cached_property
    def graph(self) -> Graph:
        successors = _random_digraph(self.nodes, self.degree, self.generator("graph"))
        return Graph(successors, *_shortest_paths(successors))

    @cached_property
    def held_out(self) -> Tensor:  # (N, N) bool
        """The pairs (node, goal) that never occur in training documents."""
        return _held_out(self.graph.distance, self.generator("held out"))


class NavEnvironment(Environment):
    """B episodes along `stops` (B, 1 + G), the start node and then the goals in order.

    G must be larger than the number of decisions. An ended episode stays at its last node.
    """

    can_end = True

    def __init__(self, graph: Graph, held_out: Tensor, stops: Tensor) -> None:
        self.graph, self.held_out, self.stops = graph, held_out, stops
        N, self.place = len(graph.successors), stops[:, 0]
        self.first_goal, self.on = N, 2 * N  # ids
        self.prompts = torch.stack([self.place, N + stops[:, 1]], dim=1)
        self.ended = torch.zeros_like(self.place, dtype=torch.bool)
        counts = torch.zeros(6, len(stops), dtype=torch.int64)
        self.reached, self.decisions, self.legal, self.closer = counts[:4]
        self.novel, self.novel_closer = counts[4:]
        self.steps = 0

    @property
    def goal(self) -> Tensor:  # (B,)
        return self.stops.gather(1, 1 + self.reached[:, None])[:, 0]

    def oracle(self) -> Tensor:
        """Return the distribution of the next node on a uniformly random shortest path."""
        graph, goal = self.graph, self.goal[:, None]
        onward = graph.successors[self.place]  # (B, D)
        closer = graph.distance[onward, goal] < graph.distance[self.place, self.goal][:, None]
        share = graph.paths[onward, goal] / graph.paths[self.place, self.goal][:, None]  # (B, D)
        p = share.new_zeros(len(share), self.on + 2)
        return p.scatter_(1, onward, share * closer)

    def step(self, tokens: Tensor) -> Tensor:
        goal, before = self.goal, self.place
        is_novel = self.held_out[before, goal] & ~self.ended
        legal = (self.graph.successors[before] == tokens[:, None]).any(1)
        self.decisions += ~self.ended
        self.ended = self.ended | ~legal
        self.place = torch.where(self.ended, before, tokens)
        self.legal += ~self.ended
        closer = self.graph.distance[self.place, goal] < self.graph.distance[before, goal]
        self.closer += closer
        self.novel += is_novel
        self.novel_closer += closer & is_novel
        arrived = self.place == goal
        self.reached += arrived
        self.steps += 1
        return torch.where(arrived, self.first_goal + self.goal, self.on)[:, None]

    def has_ended(self) -> Tensor:
        return self.ended

    def outcomes(self) -> dict[str, Tensor]:
        """Return five scores per episode.

        success              goals reached, over the goals that shortest paths reach in equal time
        legality             share of decisions that follow an edge
        optimality           share of decisions that follow an edge of a shortest path
        novel_optimality     optimality at held-out pairs (node, goal), where every journey begins
        familiar_optimality  optimality at the other pairs

        The shares are over the decisions up to and including the first that is not an edge.
        """
        moves = self.graph.distance[self.stops[:, :-1], self.stops[:, 1:]].cumsum(1)  # (B, G)
        decisions = self.decisions.double()
        return {
            "success": self.reached / (moves <= self.steps).sum(1).double(),
            "legality": self.legal / decisions,
            "optimality": self.closer / decisions,
            "novel_optimality": self.novel_closer / self.novel,
            "familiar_optimality": (self.closer - self.novel_closer) / (decisions - self.novel),
        }


def _held_out(distance: Tensor, generator: torch.Generator) -> Tensor:  # (N, N) bool
    """Choose the pairs (node, goal) to hold out.

    For each goal, add nodes together with all nodes upstream of them while their share does not
    exceed HELD_OUT. Nodes with the fewest held-out goals so far come first, in random order.
    """
    N = len(distance)
    most, held = int(HELD_OUT * (N - 1)), torch.zeros(N, N, dtype=torch.bool)
    for goal in torch.randperm(N, generator=generator).tolist():
        ranks = held.sum(1) + torch.rand(N, generator=generator)
        for place in ranks.argsort().tolist():
            upstream = distance[:, place] + distance[place, goal] == distance[:, goal]  # (N,)
            more = held[:, goal] | upstream
            if (size := more.sum()) <= most:
                held[:, goal] = more
            if size == most:
                break
    return held


def _random_digraph(nodes: int, degree: int, generator: torch.Generator) -> Tensor:  # (N, D) int64
    """Draw each node's successors: one on a random cycle through all nodes, the rest at random."""
    cycle = torch.randperm(nodes, generator=generator)
    score = torch.rand(nodes, nodes, generator=generator).fill_diagonal_(-1)
    score[cycle, cycle.roll(-1)] = 2
    return score.topk(degree).indices


def _shortest_paths(successors: Tensor) -> tuple[Tensor, Tensor]:  # (N, N) int64, (N, N) float64
    """Compute the distance and the number of shortest paths for every pair of nodes."""
    N = len(successors)
    edges = torch.zeros(N, N, dtype=torch.float64).scatter_(1, successors, 1)
    new = torch.eye(N, dtype=torch.float64)  # shortest paths of exactly `moves` moves
    distance, paths, moves = torch.full((N, N), N).fill_diagonal_(0), new, 0
    while new.any():
        moves += 1
        new = (edges @ new) * (distance == N)
        distance[new > 0] = moves
        paths = paths + new
    return distance, paths
