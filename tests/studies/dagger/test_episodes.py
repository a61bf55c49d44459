"""Test that inputs are the model's own tokens and targets are the oracle's in the same states."""

import pytest
import torch

from data.layout import Layout
from eval.rollout.environment import rollout
from eval.rollout.tasks.ctrl import THETA_MAX, Bins, Ctrl, CtrlEnvironment, Plant
from eval.rollout.tasks.nav import Graph, Nav, NavEnvironment, _shortest_paths
from eval.rollout.tasks.pdfa import Automaton, Pdfa, PdfaEnvironment
from eval.rollout.tasks.references import OraclePredictor
from model import IGNORE
from studies.dagger.episodes import label, labelled_episodes
from tests.eval.rollout.tasks.oracles import Bent, smoothed

TASKS = (Pdfa(horizon=12), Ctrl(horizon=12), Nav(horizon=12))
STREAM = "train, round 1"
n = 40


def halves(decisions):  # (1, H) float64: the middle of every distribution
    return torch.full(decisions.shape, 0.5, dtype=torch.float64)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_model_that_is_the_oracle_adds_documents(task):
    x, y = labelled_episodes(task, OraclePredictor(task.environment(n, STREAM)), n, STREAM)
    documents = task.documents(n, STREAM)
    layout = Layout(
        length=task.document_tokens, prompt=task.prompt_tokens, unscored=(*task.unscored(),)
    )
    assert x.equal(documents[:, :-1])
    assert y.equal(torch.from_numpy(layout.targets(documents[:, 1:].numpy())))
    assert not documents.equal(task.documents(n, "train, round 2"))
    assert not documents.equal(task.documents(n, "train"))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_inputs_are_what_another_model_does_and_the_targets_are_not(task):
    def model():
        return Bent(OraclePredictor(task.environment(n, STREAM)), lambda p: smoothed(p, 0.5))

    x, y = labelled_episodes(task, model(), n, STREAM)
    own = rollout(task.environment(n, STREAM), model(), task.uniforms(n, STREAM), "model")
    first, stride = task.prompt_tokens, 1 + task.answer_tokens
    assert x[:, first::stride].equal(own.tokens[:, : x[:, first::stride].size(1)])
    labels = y[:, first - 1 :: stride]  # (n, horizon)
    assert labels.shape == own.tokens.shape
    is_labelled = labels != IGNORE
    assert 0.1 < (labels == own.tokens)[is_labelled].double().mean() < 0.9
    if own.alive is not None:
        ended = ~own.alive[:, :-1]  # before the second decision and all later ones
        assert ended.any()
        assert not is_labelled[:, 1:][ended].any()


def test_pdfa_labels_are_the_automatons_in_the_states_that_own_tokens_lead_to():
    # The states 0, 1 and 2 say 0, 1 and 0. Token 0 leads to 2, token 1 to 1, end-of-text to 0.
    p = torch.eye(3, dtype=torch.float64)[[0, 1, 0]]
    automaton = Automaton(p, p > 0, torch.tensor([[2, 1, 0]] * 3))
    decisions = torch.tensor([[1, 1, 0, 1, 2, 0]])
    x, y = label(PdfaEnvironment(automaton, 1), decisions, halves(decisions))
    assert x.tolist() == [[2, 1, 1, 0, 1, 2]]  # begins with end-of-text
    assert y.tolist() == [[0, 1, 1, 0, 1, 0]]  # in the states 0, 1, 1, 2, 1, 0


def test_ctrl_labels_push_back_from_where_the_own_actions_lead():
    angles, actions, first = Bins(33, THETA_MAX), Bins(17, 10.0), 33  # id of the action -10
    still = torch.zeros(3, 1, dtype=torch.float64)
    plant = Plant(stiffness=10.0, noise=0.2)
    environment = CtrlEnvironment(plant, angles, actions, torch.zeros(2, 1).double(), still)
    decisions = torch.tensor([[first + 16, first + 16, first + 8]])
    x, y = label(environment, decisions, halves(decisions))
    # Upright and at rest, the oracle does nothing (bin 8). The action 9.41 for 0.2 s leads to
    # 0.376 rad, where it pushes back at full force (bin 0). The same action again makes it fall.
    assert x.tolist() == [[16, first + 16, 30, first + 16, 32]]
    assert y.tolist() == [[first + 8, IGNORE, first, IGNORE, IGNORE]]


def test_nav_labels_lead_on_from_wrong_nodes_but_not_at_held_out_pairs_or_after_the_end():
    successors = torch.tensor([[1, 3], [2, 0], [3, 1], [0, 2]])  # a ring in both directions
    graph = Graph(successors, *_shortest_paths(successors))
    held_out = torch.zeros(4, 4, dtype=torch.bool)
    held_out[2, 1] = True
    stops = torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1]])
    decisions = torch.tensor([[3, 2, 1, 0, 2, 1]])
    environment = NavEnvironment(graph, held_out, stops)
    x, y = label(environment, decisions, 0.9 + 0 * halves(decisions))
    on, to = 8, 4
    # From 0 to 1, but to 3, but to 2 (a held-out pair), to 1; to 0; to 2, where there is no edge.
    assert x.tolist() == [[0, to + 1, 3, on, 2, on, 1, to + 0, 0, to + 1, 2, on]]
    wanted = [1, 2, IGNORE, 0, 1, IGNORE]  # from 3, both ways are shortest; 0.9 draws the last one
    assert y[0, 1::2].tolist() == wanted
    assert (y[0, 0::2] == IGNORE).all()
