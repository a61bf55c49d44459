"""Compare nav with scipy's shortest paths, with the enumeration of all paths and by hand."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import connected_components, shortest_path

from eval.rollout.tasks.nav import HELD_OUT, Nav
from eval.rollout.tasks.references import OraclePredictor
from eval.rollout.tasks.task import TaskError
from tests.eval.rollout.tasks.oracles import both_rollouts

EXACT = 1e-12  # float64, products of a few shares
N = 40
ON = 2 * N  # ids are nodes, then goals, then "on", then end-of-text


@pytest.fixture(scope="module")
def task():
    return Nav(nodes=N, degree=3, horizon=24)


@pytest.fixture(scope="module")
def successors(task):
    return task.graph.successors.tolist()


def edges(task) -> np.ndarray:  # (N, N) bool
    matrix = np.zeros((task.nodes, task.nodes), dtype=bool)
    matrix[np.arange(task.nodes)[:, None], task.graph.successors.numpy()] = True
    return matrix


def walks(successors, place, goal, moves):
    """List all walks from `place` to `goal` with `moves` moves, without their first node."""
    if moves == 0:
        return [[]] if place == goal else []
    onward = successors[place]
    return [[w, *rest] for w in onward for rest in walks(successors, w, goal, moves - 1)]


def shortest(task, place, goal):
    """List all shortest paths, without their first node."""
    return walks(task.graph.successors.tolist(), place, goal, task.graph.distance[place, goal])


def walk(environment, tokens):
    """Take the decisions `tokens` in the environment's only episode and return the answers."""
    return [environment.step(torch.tensor([token])).item() for token in tokens]


def outcomes(environment):
    return {name: values.item() for name, values in environment.outcomes().items()}


@pytest.fixture
def episode(task):
    """Return an episode with a first goal at least three moves away, and a shortest path."""
    for seed in range(20):
        environment = task.environment(1, seed)
        place, goal = environment.stops[0, :2].tolist()
        if task.graph.distance[place, goal] >= 3:
            return environment, shortest(task, place, goal)[0]
    raise AssertionError("no first goal is three moves away")


def journeys(task, seed, n):
    """Yield (goal, nodes up to the goal or to the end of the document) for n documents."""
    for document in task.documents(n, seed).tolist():
        goal, way = None, []
        for place, answer in zip(document[::2], [*document[1::2], ON], strict=True):
            way.append(place)
            if answer < ON:
                if goal is not None:
                    yield goal, way
                goal, way = answer - N, [place]
        yield goal, way


@pytest.mark.parametrize("instance", range(5))
def test_the_graph_is_strongly_connected_regular_and_without_loops(instance):
    task = Nav(instance=instance, nodes=128, degree=3)
    matrix = edges(task)
    assert connected_components(matrix, connection="strong")[0] == 1
    assert (matrix.sum(1) == 3).all()
    assert not matrix.diagonal().any()


@pytest.mark.parametrize("degree", [2, 3, 6])
def test_distances_are_scipys(degree):
    task = Nav(nodes=128, degree=degree)
    expected = shortest_path(edges(task), unweighted=True)
    assert (task.graph.distance.numpy() == expected).all()


def test_shortest_paths_are_as_many_as_enumeration_finds(task):
    found = task.graph.paths.tolist()
    for place in range(0, N, 3):
        for goal in range(N):
            assert found[place][goal] == len(shortest(task, place, goal))


def test_every_shortest_path_has_the_same_probability_however_its_start_was_reached(task):
    place, several = 0, 0
    for goal in range(1, N):
        paths = shortest(task, place, goal)
        for path in paths:
            environment, chance = task.environment(1, 0), 1.0
            environment.place, environment.stops[0, 1] = torch.tensor([place]), goal
            for token in path:
                chance *= environment.oracle()[0, token].item()
                walk(environment, [token])
            assert chance == pytest.approx(1 / len(paths), rel=EXACT)
        several += len(paths) > 1
    assert several > N / 10


def test_wherever_edges_lead_the_oracle_goes_on_by_shortest_paths(task, successors):
    environment = task.environment(200, 0)
    edge = torch.randint(3, (task.horizon, 200), generator=torch.Generator().manual_seed(0))
    for choice in edge:
        q, distance = environment.oracle().numpy(), task.graph.distance.numpy()
        assert q.sum(1) == pytest.approx(1, abs=EXACT)
        for place, goal, row in zip(
            environment.place.tolist(), environment.goal.tolist(), q, strict=True
        ):
            onward = np.flatnonzero(row).tolist()
            assert set(onward) <= set(successors[place])
            assert (distance[onward, goal] == distance[place, goal] - 1).all()
        environment.step(task.graph.successors[environment.place, choice])
    assert not environment.has_ended().any()
    assert environment.reached.any()  # some by chance


@pytest.mark.parametrize("seed", ["train", 0])
def test_a_document_is_places_in_turn_with_answers_and_has_no_padding(task, seed):
    documents = task.documents(300, seed)
    assert documents.shape == (300, 2 + 2 * 24 - 1)
    places, answers = documents[:, 0::2], documents[:, 1::2]
    assert places.max() < N <= answers.min()
    assert answers.max() == ON == len(task.symbols()) - 1
    assert task.unscored() == list(range(N, ON + 1))
    goal = answers[:, 0]
    for place, answer in zip(places[:, 1:-1].unbind(1), answers[:, 1:].unbind(1), strict=True):
        arrived = place + N == goal
        assert (answer < ON).equal(arrived)
        goal = torch.where(arrived, answer, goal)


@pytest.mark.parametrize("seed", ["train", "val", 0, 7])
def test_journeys_are_shortest_paths(task, seed):
    matrix, distance = edges(task), task.graph.distance.numpy()
    for goal, way in journeys(task, seed, 200):
        assert all(matrix[a, b] for a, b in pairwise(way))
        left = distance[way, goal]
        assert (left == left[0] - np.arange(len(way))).all()


@pytest.mark.parametrize("stream", ["train", "train, round 1"])
def test_no_held_out_pair_occurs_anywhere_in_training_and_all_others_do(task, stream):
    seen = torch.zeros(N, N, dtype=torch.bool)
    for goal, way in journeys(task, stream, 5000):
        seen[way, goal] = True
    seen.fill_diagonal_(False)
    assert not (seen & task.held_out).any()
    assert (seen | task.held_out).sum() > 0.99 * N * (N - 1)


@pytest.mark.parametrize("seed", ["val", 0, 7])
def test_journeys_that_are_not_training_begin_at_held_out_pairs(task, seed):
    seen = torch.zeros(N, N, dtype=torch.bool)
    for goal, way in journeys(task, seed, 1000):
        assert task.held_out[way[0], goal]
        seen[way[0], goal] = True
    assert seen.sum() > 0.99 * task.held_out.sum()


def test_held_out_pairs_are_closed_upstream(task):
    for place in range(N):
        for goal in range(N):
            on_the_way = {p for path in shortest(task, place, goal) for p in path[:-1]}
            if any(task.held_out[p, goal] for p in on_the_way):
                assert task.held_out[place, goal]


@pytest.mark.parametrize("nodes", [24, 40, 128])
@pytest.mark.parametrize("instance", range(3))
def test_every_goal_has_its_share_held_out_and_every_place_both_kinds(nodes, instance):
    held_out = Nav(nodes=nodes, instance=instance).held_out
    assert (held_out.sum(0) == int(HELD_OUT * (nodes - 1))).all()
    assert held_out.any(1).all()
    assert (held_out.sum(1) < 0.25 * nodes).all()
    assert not held_out.diagonal().any()


def test_a_model_that_is_the_oracle_succeeds_without_a_gap(task):
    data, own = both_rollouts(task, OraclePredictor(task.environment(500, 3)), n=500, seed=3)
    assert own.tokens.equal(data.tokens)
    assert all((values == 1).all() for values in own.outcomes.values())
    assert own.error.abs().max() < EXACT


def test_an_answer_is_the_next_goal_where_the_goal_is_reached(episode):
    environment, path = episode
    goals = environment.stops[0, 1:].tolist()
    assert environment.prompts.tolist() == [[environment.place.item(), N + goals[0]]]
    assert walk(environment, path) == [ON] * (len(path) - 1) + [N + goals[1]]
    assert environment.place.item() == path[-1] == goals[0]
    assert environment.goal.item() == goals[1]
    result = outcomes(environment)
    assert result["success"] == result["legality"] == result["optimality"] == 1


def test_a_wrong_edge_costs_time_and_is_made_good(task, successors, episode):
    (environment, path), distance = episode, task.graph.distance
    goal = path[-1]
    before, wrong = next(
        (a, b) for a in path[:-1] for b in successors[a] if distance[b, goal] >= distance[a, goal]
    )
    tokens = [*path[: path.index(before) + 1], wrong, *shortest(task, wrong, goal)[0]]
    assert walk(environment, tokens)[-1] == N + environment.stops[0, 2]
    assert not environment.has_ended().any()
    result, n = outcomes(environment), len(tokens)
    assert (result["legality"], result["optimality"]) == (1, pytest.approx((n - 1) / n))
    possible = np.cumsum([distance[a, b] for a, b in pairwise(environment.stops[0].tolist())]) <= n
    assert result["success"] == 1 / possible.sum()


@pytest.mark.parametrize("kind", ["no edge", "itself", "a goal", "on", "end-of-text"])
def test_a_token_that_is_no_edge_ends_the_episode(task, successors, episode, kind):
    environment, path = episode
    walk(environment, path[:1])
    no_edge = next(p for p in range(N) if p not in [*successors[path[0]], path[0]])
    token = {"no edge": no_edge, "itself": path[0], "a goal": N + path[1], "on": ON}
    assert walk(environment, [token.get(kind, ON + 1), *path[1:]]) == [ON] * len(path)
    assert environment.has_ended().all()
    assert environment.place.item() == path[0]
    result = outcomes(environment)
    assert (result["success"], result["legality"], result["optimality"]) == (0, 0.5, 0.5)


def test_decisions_at_held_out_pairs_are_counted_apart(task):
    environment, counts = (
        task.environment(200, 3),
        torch.zeros(2, 2, 200),
    )  # [not held out, held out], [closer, all], episode
    for u in task.uniforms(200, 3).unbind(1):
        held = task.held_out[environment.place, environment.goal].long()
        before, goal, alive = (
            environment.place.clone(),
            environment.goal.clone(),
            ~environment.ended,
        )
        environment.step(torch.where(u < 0.8, environment.oracle().argmax(1), (u * 97 % N).long()))
        closer = task.graph.distance[environment.place, goal] < task.graph.distance[before, goal]
        rows = torch.arange(200)
        counts[held, 0, rows] += (closer & alive).float()
        counts[held, 1, rows] += alive.float()
    shares = counts[:, 0] / counts[:, 1]  # NaN if there are no decisions of a kind
    found = environment.outcomes()
    assert np.allclose(found["novel_optimality"], shares[1], equal_nan=True)
    assert np.allclose(found["familiar_optimality"], shares[0], equal_nan=True)
    assert not shares[1].isnan().any()  # every journey begins at a held-out pair
    assert 0 < shares[1].mean() < 1


def test_what_was_reached_before_the_end_counts(task, episode):
    environment, path = episode
    walk(environment, [*path, ON] + [0] * (task.horizon - len(path) - 1))
    possible = (
        environment.graph.distance[environment.stops[0, :-1], environment.stops[0, 1:]].cumsum(0)
        <= 24
    ).sum()
    assert outcomes(environment)["success"] == 1 / possible.item()
    assert outcomes(environment)["legality"] == pytest.approx(len(path) / (len(path) + 1))


def test_goals_do_not_depend_on_decisions(task):
    environment, other = task.environment(50, 3), task.environment(50, 3)
    for _ in range(task.horizon):
        environment.step(environment.oracle().argmax(1))
        other.step(task.graph.successors[other.place, 0])
    assert environment.stops.equal(other.stops)
    assert (environment.reached > other.reached).any()


def test_a_horizon_in_which_every_first_goal_can_be_reached_is_wanted():
    longest = int(Nav(nodes=N).graph.distance.max())
    assert Nav(nodes=N, horizon=longest).horizon == longest
    with pytest.raises(TaskError, match=f"use horizon={longest} or a larger degree"):
        Nav(nodes=N, horizon=longest - 1)


def test_a_graph_too_small_to_hold_pairs_out_everywhere_is_refused():
    with pytest.raises(TaskError, match=r"nodes=16 are too few: .*use more nodes"):
        Nav(nodes=16)
