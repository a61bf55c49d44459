"""Navigation against scipy's shortest paths, enumeration of all paths, and walks by hand."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import connected_components, shortest_path

from eval.tasks.nav import Nav

EXACT = 1e-12  # float64, products of a few shares
N = 40
PAD, END = N, N + 1


@pytest.fixture(scope="module")
def task():
    return Nav(nodes=N, horizon=20)


@pytest.fixture(scope="module")
def successors(task):
    return task.graph.successors.tolist()


def edges(task) -> np.ndarray:  # (N, N) bool
    matrix = np.zeros((task.nodes, task.nodes), dtype=bool)
    matrix[np.arange(task.nodes)[:, None], task.graph.successors.numpy()] = True
    return matrix


def walks(successors, node, goal, moves):
    """All walks of so many moves, without their first node."""
    if moves == 0:
        return [[]] if node == goal else []
    onward = successors[node]
    return [[w, *rest] for w in onward for rest in walks(successors, w, goal, moves - 1)]


def walk(world, *tokens):
    """Takes the same decisions in every episode of the world; its outcomes."""
    for token in tokens:
        world.step(torch.full((len(world.prompts),), token))
    return {name: values.tolist() for name, values in world.outcomes().items()}


@pytest.fixture
def episode(task, successors):
    """One episode whose shortest paths take at least three moves, and such a path."""
    for seed in range(20):
        world = task.world(1, seed)
        goal, start = world.prompts[0].tolist()
        moves = int(task.graph.distance[start, goal])
        if moves >= 3:
            return world, walks(successors, start, goal, moves)[0]
    raise AssertionError("no pair is three moves apart")


@pytest.mark.parametrize("instance", range(5))
def test_the_graph_is_strongly_connected_regular_and_without_loops(instance):
    task = Nav(instance=instance)
    matrix = edges(task)
    assert connected_components(matrix, connection="strong")[0] == 1
    assert (matrix.sum(1) == 3).all()
    assert not matrix.diagonal().any()


@pytest.mark.parametrize("degree", [2, 3, 6])
def test_distances_are_scipys(degree):
    task = Nav(degree=degree, horizon=40)
    wanted = shortest_path(edges(task), unweighted=True)
    assert (task.graph.distance.numpy() == wanted).all()


def test_shortest_paths_are_as_many_as_enumeration_finds(task, successors):
    found = task.graph.paths.tolist()
    for start in range(0, N, 3):
        for goal in range(N):
            moves = int(task.graph.distance[start, goal])
            assert found[start][goal] == len(walks(successors, start, goal, moves))


def test_every_shortest_path_has_the_same_probability(task, successors):
    for start, goal in task.pairs[1][:40].tolist():
        paths = walks(successors, start, goal, int(task.graph.distance[start, goal]))
        for path in paths:
            world, chance = task.world(1, 0), 1.0
            world.node, world.goal = torch.tensor([start]), torch.tensor([goal])
            for token in [*path, END]:
                chance *= world.oracle()[0, token].item()
                world.step(torch.tensor([token]))
            assert chance == pytest.approx(1 / len(paths), rel=EXACT)


def test_documents_are_shortest_paths_with_an_end_and_padding_that_no_loss_counts(task):
    assert task.unscored() == [PAD]
    matrix, distance = edges(task), task.graph.distance.numpy()
    for goal, start, *tokens in task.documents(300, "train").tolist():
        moves = distance[start, goal]
        path = [start, *tokens[:moves]]
        assert path[-1] == goal != start
        assert all(matrix[a, b] for a, b in pairwise(path))
        assert tokens[moves:] == [END] + [PAD] * (task.horizon - moves - 1)


def test_held_out_pairs_never_occur_in_training(task):
    training, held_out = ({*map(tuple, pairs.tolist())} for pairs in task.pairs)
    assert len(held_out) == N * (N - 1) // 10
    assert len(training) + len(held_out) == N * (N - 1) == len(training | held_out)
    for seed in ("train", "val", 0, 7):
        prompts = task.documents(5000, seed)[:, :2].flip(1)  # (start, goal)
        seen = {*map(tuple, prompts.tolist())}
        assert seen <= (training if seed == "train" else held_out)
        assert len(seen) > 0.9 * min(5000, len(held_out))


def test_from_wherever_a_model_jumps_the_oracle_knows_the_way(task):
    world = task.world(N, 0)
    goal = world.prompts[:, 0]
    jump = torch.arange(N)  # mostly no edge
    world.step(jump)
    q = world.oracle().numpy()
    distance = task.graph.distance.numpy()
    for b in range(N):
        if jump[b] == goal[b]:
            assert q[b, END] == 1
            continue
        onward = np.flatnonzero(q[b])
        assert edges(task)[jump[b], onward].all()
        assert (distance[onward, goal[b]] == distance[jump[b], goal[b]] - 1).all()
        assert q[b].sum() == pytest.approx(1, abs=EXACT)


def test_a_shortest_path_succeeds_and_is_optimal(episode):
    world, path = episode
    outcomes = walk(world, *path, END)
    assert outcomes == {"success": [1], "legality": [1], "optimality": [1]}
    assert world.has_ended().all()
    assert world.oracle()[0, PAD] == 1
    assert walk(world, PAD, path[0], END) == outcomes  # what comes after the end is nothing


def test_a_detour_over_edges_succeeds_but_is_not_optimal(task, successors, episode):
    world, path = episode
    goal, onward = path[-1], successors[path[-1]][0]
    back = walks(successors, onward, goal, int(task.graph.distance[onward, goal]))[0]
    outcomes = walk(world, *path, onward, *back, END)  # through the goal, around, and back
    assert outcomes == {"success": [1], "legality": [1], "optimality": [0]}


def test_a_jump_spoils_the_success_but_does_not_end_the_episode(episode):
    world, path = episode
    outcomes = walk(world, path[-1])  # at least three moves away
    assert not world.has_ended().any()
    assert outcomes["legality"] == [0]
    assert walk(world, END) == {"success": [0], "legality": [0.5], "optimality": [0]}
    assert world.has_ended().all()


@pytest.mark.parametrize("token", [PAD, END])
def test_stopping_before_the_goal_fails(episode, token):
    world, path = episode
    outcomes = walk(world, path[0], path[1], token, path[2], END)
    assert outcomes == {"success": [0], "legality": [pytest.approx(2 / 3)], "optimality": [0]}
    assert world.has_ended().all()
    assert world.oracle()[0].nonzero().tolist() == [[PAD]]


def test_being_at_the_goal_without_the_end_is_no_success_nor_is_padding_there(episode):
    world, path = episode
    assert walk(world, *path) == {"success": [0], "legality": [1], "optimality": [0]}
    assert walk(world, PAD)["success"] == [0]


def test_a_horizon_that_is_long_enough_is_the_shortest_that_is_accepted():
    longest = int(Nav().graph.distance.max())
    assert Nav(horizon=longest + 5).horizon == longest + 5
    with pytest.raises(ValueError, match=f"use horizon={longest + 5}"):
        Nav(horizon=longest + 4)
