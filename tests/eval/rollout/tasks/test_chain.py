"""Test that the exact match of a deterministic answer follows from the validation loss."""

import itertools
import math

import pytest
import torch

from eval.rollout.policy import GPTPredictor
from eval.rollout.tasks.chain import Chain
from eval.rollout.tasks.references import OraclePredictor
from tests.eval.rollout.tasks.oracles import Bent, Product, both_rollouts, random_gpt, smoothed

EXACT = 1e-5  # a float32 GPT whose contexts are read in different batches


def often_right(task, n, seed, power=4.0):
    """Build a model near the oracle whose errors depend on the context and grow with `power`."""
    near = Bent(OraclePredictor(task.environment(n, seed)), smoothed)
    return Product(near, GPTPredictor(random_gpt(task)), power)


def greedy(p):
    """Put all mass on the likeliest token."""
    return torch.nn.functional.one_hot(p.argmax(-1), p.size(-1)).double()


def test_documents_are_the_recurrence():
    task = Chain(instance=3)
    for x, b, *values in task.documents(100, "train").tolist():
        for value in values:
            x = (task.multiplier * x + b) % task.modulus
            assert value == x


def test_the_right_answer_ignores_mistakes():
    task = Chain()
    environment, twin = task.environment(10, 0), task.environment(10, 0)
    environment.step(environment.oracle().argmax(1))
    twin.step(torch.full((10,), task.modulus))
    assert environment.oracle().equal(twin.oracle())
    assert environment.outcomes()["exact_match"].tolist() == [1] * 10
    assert twin.outcomes()["exact_match"].tolist() == [0] * 10


def test_greedy_exact_match_is_whether_all_is_right_on_the_datas_contexts():
    task = Chain()
    predictor = Bent(often_right(task, 500, 0, power=16.0), greedy)
    data, own = both_rollouts(task, predictor, n=500, seed=0)
    all_right = (data.nll == 0).all(1)
    assert own.outcomes["exact_match"].bool().equal(all_right)
    assert 0.05 < all_right.double().mean() < 0.95  # both cases occur


def test_sampled_exact_match_is_the_datas_likelihood_up_to_monte_carlo_error():
    task, n = Chain(), 5000
    data, own = both_rollouts(task, often_right(task, n, 0), n=n, seed=0)
    likelihood, match = (-data.nll.sum(1)).exp(), own.outcomes["exact_match"]
    assert 0.05 < match.mean() < 0.95
    difference = match - likelihood
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(n)  # the seed is fixed


def test_sampled_exact_match_is_the_datas_likelihood_exactly():
    task, n = Chain(modulus=3, horizon=2), 9
    predictor = often_right(task, n, 0)
    expected = torch.zeros(n).double()
    for first, second in itertools.product(range(4), repeat=2):  # all possible decisions
        environment = task.environment(n, 0)
        log_p = predictor.start(environment.prompts)[:, first]
        environment.step(torch.full((n,), first))
        log_p = log_p + predictor.read(torch.full((n, 1), first))[:, second]
        environment.step(torch.full((n,), second))
        expected += log_p.exp() * environment.outcomes()["exact_match"]
    data, _ = both_rollouts(task, predictor, n=n, seed=0)
    assert expected.numpy() == pytest.approx((-data.nll.sum(1)).exp().numpy(), rel=EXACT)
