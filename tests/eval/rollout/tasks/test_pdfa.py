"""Compare pdfa with linear algebra, enumeration and scipy's graph algorithms."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.sparse.csgraph import connected_components

from eval.rollout.tasks.pdfa import LIKELY, Pdfa
from eval.rollout.tasks.references import OraclePredictor

EXACT = 1e-12  # float64, products of a few probabilities


@pytest.fixture(scope="module")
def task():
    return Pdfa()


def transition_matrix(automaton) -> np.ndarray:  # (S, S)
    """Return P[s, s'], the probability that one token leads from s to s'."""
    S, V = automaton.p.shape
    P = np.zeros((S, S))
    for s, v in itertools.product(range(S), range(V)):
        P[s, automaton.target[s, v]] += automaton.p[s, v]
    return P


def entropy_rate(automaton) -> float:
    """Compute the stationary entropy of the next token given the state, in nats."""
    P = transition_matrix(automaton)
    S = len(P)
    equations = np.vstack([P.T - np.eye(S), np.ones(S)])  # pi P = pi, sum pi = 1
    stationary = np.linalg.lstsq(equations, np.eye(S + 1)[S], rcond=None)[0]
    return float(stationary @ stats.entropy(automaton.p.numpy(), axis=1))


@pytest.mark.parametrize("instance", range(5))
def test_all_states_can_be_reached_from_all(instance):
    graph = transition_matrix(Pdfa(instance=instance).automaton) > 0
    assert connected_components(graph, connection="strong")[0] == 1


def test_three_symbols_a_state_share_99_percent_and_everything_can_happen(task):
    automaton = task.automaton
    p, likely = automaton.p.numpy(), automaton.likely.numpy()
    assert (likely.sum(1) == LIKELY).all()
    assert not likely[:, -1].any()  # end-of-text
    assert np.where(likely, p, 0).sum(1) == pytest.approx(0.99, abs=EXACT)
    assert p[~likely] == pytest.approx(0.01 / 8, abs=EXACT)
    assert p.min() > 0


def test_end_of_text_leads_to_where_a_document_begins(task):
    environment, seen = task.environment(20, 0), task.environment(20, 0)
    assert (environment.prompts == len(task.symbols())).all()
    for token in task.documents(20, 0)[:, 1:6].unbind(1):
        seen.step(token)
    assert not seen.oracle().equal(environment.oracle())
    seen.step(environment.prompts[:, 0])
    assert seen.oracle().equal(environment.oracle())


def test_the_oracle_is_the_belief_of_the_forward_algorithm_on_any_history(task):
    automaton, environment = task.automaton, task.environment(30, 0)
    emit = np.zeros((11, 16, 16))  # emit[v, s, s'] = p(v | s) if v leads from s to s'
    for s, v in itertools.product(range(16), range(11)):
        emit[v, s, automaton.target[s, v]] = automaton.p[s, v]
    belief = np.tile(np.eye(16)[0], (30, 1))  # (B, S)
    histories = torch.randint(11, (30, 12), generator=torch.Generator().manual_seed(0))
    for token in histories.unbind(1):
        environment.step(token)
        belief = np.einsum("bs,bst->bt", belief, emit[token])
        belief /= belief.sum(1, keepdims=True)
        expected = np.einsum("bs,vst->bv", belief, emit)
        assert environment.oracle().numpy() == pytest.approx(expected, abs=EXACT)


def test_documents_follow_the_automatons_law():
    task, n = Pdfa(states=3, alphabet=3, horizon=2), 40_000
    p, target = task.automaton.p.numpy(), task.automaton.target.numpy()
    law = np.array([p[0, a] * p[target[0, a], b] for a in range(4) for b in range(4)])
    first, second = task.documents(n, "train")[:, 1:].numpy().T
    counts = np.bincount(4 * first + second, minlength=16)
    assert law.sum() == pytest.approx(1, abs=EXACT)
    assert stats.chisquare(counts, n * law).pvalue > 0.01  # the seed is fixed


def test_the_oracles_entropy_is_the_stationary_one():
    task = Pdfa(horizon=128)
    grade = task.grade(OraclePredictor(task.environment(512, 0)), n=512, seed=0)
    rate = entropy_rate(task.automaton)
    assert 0.5 < rate < np.log(3) + 0.1
    assert grade.metrics["val_ce"].mean == pytest.approx(rate, abs=0.01)  # 65,536 decisions
    assert grade.metrics["entropy_drift"].mean == pytest.approx(0, abs=0.01)


def test_one_percent_of_the_oracles_tokens_are_unlikely(task):
    grade = task.grade(OraclePredictor(task.environment(512, 0)), n=512, seed=0)
    share = grade.metrics["unlikely_share"]
    assert share.mean == pytest.approx(0.01, abs=5 * np.sqrt(0.01 * 0.99 / (512 * 64)))
    assert share.lo < 0.01 < share.hi


def test_unlikely_tokens_are_counted_in_the_state_they_are_drawn_in(task):
    automaton, environment, expected = task.automaton, task.environment(40, 0), np.zeros(40)
    tokens = torch.randint(11, (40, 9), generator=torch.Generator().manual_seed(0))
    states = np.zeros(40, dtype=int)
    for token in tokens.unbind(1):
        environment.step(token)
        expected += automaton.p.numpy()[states, token] < 0.002
        states = automaton.target.numpy()[states, token]
    assert environment.outcomes()["unlikely_share"].numpy() == pytest.approx(
        expected / 9, abs=EXACT
    )
    assert not environment.has_ended().any()
