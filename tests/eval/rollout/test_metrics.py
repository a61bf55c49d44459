"""Test the metrics with sums by hand and with identities that hold for every task."""

import json
import math

import numpy as np
import pytest
import torch

from eval.rollout.environment import Rollout
from eval.rollout.intervals import Estimate
from eval.rollout.metrics import N_SAMPLES, magnitude, oracle_grade
from eval.rollout.policy import GPTPredictor
from eval.rollout.tasks.chain import Chain
from eval.rollout.tasks.ctrl import Ctrl
from eval.rollout.tasks.nav import Nav
from eval.rollout.tasks.pdfa import Pdfa
from eval.rollout.tasks.references import OraclePredictor
from tests.eval.rollout.tasks.oracles import Bent, both_rollouts, random_gpt

TASKS = [Pdfa(horizon=24), Nav(nodes=24, horizon=16), Chain()]
EXACT = 1e-12  # float64, sums of at most a few dozen terms
X = math.nan  # an episode that has ended

every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def episodes(error, nll=None, entropy=None, alive=None, **outcomes) -> Rollout:
    given = (error, nll or error, entropy or error)
    tables = [torch.tensor(rows, dtype=torch.float64) for rows in given]
    scores = {name: torch.tensor(each).double() for name, each in outcomes.items()}
    tokens = torch.zeros(tables[0].shape, dtype=torch.int64)
    return Rollout(tokens, tables[0], 2 * tables[0], *tables[1:], outcomes=scores, alive=alive)


@pytest.fixture
def by_hand():
    ends, falls = torch.tensor([[1, 0, 0], [1, 1, 1]]), torch.tensor([[0, 0, 0], [1, 1, 0]])
    data = episodes([[1, 2, X], [3, 4, 6]], [[2, 2, X], [3, 1, 7]], alive=ends, reached=[1, 1])
    own = episodes([[2, X, X], [4, 6, 1]], None, [[9, X, X], [9, 4, 7]], falls, reached=[0, 1])
    return oracle_grade(data, own)


def test_curves_are_sums_over_all_episodes():
    grade = oracle_grade(episodes([[1, 2], [3, 4]]), episodes([[2, 0], [4, 7]]))
    assert grade.curves["A"].mean == [2, 2 + 3]
    assert grade.curves["B"].mean == [3, 3 + 3.5]
    assert grade.curves["G"].mean == pytest.approx([1 / 1, 1.5 / 2], rel=EXACT)
    assert grade.curves["C"].mean == [6, 6 + 7]  # `episodes` sets the reverse KL to twice the error
    assert "survival" not in grade.curves
    means = grade.means()
    assert (means["accumulated_kl"], means["gap"], means["excess_percent"]) == (6.5, 0.75, 30.0)
    assert means["jeffreys"] == 5 + 13


def test_where_episodes_end_nothing_rewards_an_early_end(by_hand):
    assert by_hand.curves["A"].mean == [2, 2 + 3, 2 + 3 + 6 / 2]  # ended episodes add 0
    assert by_hand.curves.keys() == {"A", "C", "survival", "data_survival"}
    assert by_hand.curves["survival"].mean == [0.5, 0.5, 0]  # after each decision
    assert by_hand.curves["data_survival"].mean == [1, 0.5, 0.5]
    assert by_hand.n_t == {"data": [2, 2, 1], "own": [2, 1, 1]}


def test_after_the_last_decision_those_survive_that_never_failed():
    grade = Ctrl(horizon=12).grade(GPTPredictor(random_gpt(Ctrl(horizon=12))), n=64, seed=0)
    survival = grade.curves["survival"].mean
    assert 0 < survival[-1] < survival[0]
    assert survival[-1] == pytest.approx(1 - grade.metrics["failure"].mean, rel=EXACT)


def test_metrics_by_hand(by_hand):
    expected = {
        "val_kl": (1 + 2 + 3 + 4 + 6) / 5,  # over decisions, not over episodes
        "val_ce": (2 + 2 + 3 + 1 + 7) / 5,
        "overconfidence": (2 + 2 + 3 + 1 + 7) / 5 - (1 + 2 + 3 + 4 + 6) / 5,
        "sequence_kl": 13.0,  # `episodes` sets the reverse KL to twice the error
        "jeffreys": 8.0 + 13.0,
        "reached": 0.5,
        "data_reached": 1,
    }  # no gap and no drift, because episodes ended
    assert by_hand.means() == pytest.approx(expected, rel=EXACT)
    assert all(each.n == 2 for each in by_hand.metrics.values())


def test_drift_compares_the_same_half_of_both():
    data = episodes([[1, 1, 1, 1]], nll=[[9, 9, 2, 4]])
    own = episodes([[1, 1, 1, 1]], entropy=[[7, 7, 5, 5]])
    assert oracle_grade(data, own).metrics["entropy_drift"].mean == 5 - 3


def test_an_error_without_bound_is_infinite_and_not_a_number():
    data = episodes([[1.0, math.inf], [2.0, 3.0]], [[1.0, 1.0]] * 2, [[1.0, 1.0]] * 2)
    metrics = oracle_grade(data, episodes([[1.0, 1.0], [2.0, 2.0]])).metrics
    assert metrics["val_kl"].mean == metrics["jeffreys"].mean == math.inf
    assert metrics["sequence_kl"].mean == 6.0


def test_without_the_oracles_support_there_is_no_sequence_kl():
    own = episodes([[1.0, 2.0]])
    own.reverse[0, 1] = math.inf
    assert "sequence_kl" not in oracle_grade(own, own).metrics


def test_both_rollouts_are_resampled_together():
    error = torch.rand(40, 6, generator=torch.Generator().manual_seed(0)).tolist()
    shifted = [[x + 0.5 for x in row] for row in error]
    grade = oracle_grade(episodes(error), episodes(shifted))
    for each in (grade.metrics["gap"], grade.metrics["accumulated_kl"]):
        assert each.lo <= each.mean <= each.hi
    gap, total = grade.metrics["gap"], grade.metrics["accumulated_kl"]
    assert (gap.mean, gap.lo, gap.hi) == pytest.approx((0.5, 0.5, 0.5), rel=EXACT)
    assert total.hi - total.lo > 0.1  # the episodes differ, but their difference does not


def test_a_grade_is_json_and_shows_the_first_episodes():
    task = Chain()
    data, own = both_rollouts(task, GPTPredictor(random_gpt(task)), n=8, seed=0)
    grade = json.loads(json.dumps(oracle_grade(data, own).to_json()))
    assert grade["samples"][1] == {"data": data.tokens[1].tolist(), "own": own.tokens[1].tolist()}
    assert len(grade["samples"]) == N_SAMPLES
    assert len(grade["curves"]["G"]["hi"]) == task.horizon
    assert grade["metrics"]["gap"].keys() == {"mean", "lo", "hi", "n"}


@every_task
def test_the_oracle_itself_has_no_gap_and_no_error(task):
    grade = task.grade(OraclePredictor(task.environment(128, 1)), n=128, seed=1)
    errors = [curve.mean for name, curve in grade.curves.items() if name in "ABCG"]
    assert np.abs(errors).max() < EXACT
    assert grade.means().get("gap", 0) < EXACT
    assert ("survival" in grade.curves) == task.environment(
        1, 0
    ).can_end  # even though no episode of nav's oracle ends
    if task.higher_is_better:
        best = grade.metrics[task.primary]
        assert (best.mean, best.lo, best.hi) == (1, 1, 1)


@every_task
def test_one_step_is_the_same_on_both_contexts_for_any_model(task):
    data, own = both_rollouts(task, GPTPredictor(random_gpt(task)), n=64, seed=0)
    assert own.error[:, 0].equal(data.error[:, 0])
    assert own.reverse[:, 0].equal(data.reverse[:, 0])
    assert (own.error[:, 0] > 0).all()


def test_an_error_that_no_context_changes_accumulates_linearly_without_a_gap():
    task, share = Chain(horizon=12), 0.2

    def never_right(p):  # end-of-text, which is never right, gets a share
        p = (1 - share) * p
        p[:, -1] += share
        return p

    grade = task.grade(Bent(OraclePredictor(task.environment(64, 0)), never_right), n=64, seed=0)
    A, B = (np.array(grade.curves[name].mean) for name in "AB")
    steps = np.arange(1, 13)
    assert pytest.approx(-math.log(1 - share) * steps, rel=EXACT) == A
    assert pytest.approx(steps, rel=EXACT) == B / (A / steps)  # AccErr(l) = l
    assert np.abs(grade.curves["G"].mean).max() < EXACT
    assert grade.metrics["exact_match"].mean < 0.5  # the rollouts do leave the data's contexts


@pytest.mark.parametrize(
    ("signed", "expected"),
    [((-1, -3, 2), (1, 0, 3)), ((2, 1, 3), (2, 1, 3)), ((-2, -3, -1), (2, 1, 3))],
)
def test_the_interval_of_a_magnitude_contains_zero_if_that_of_the_number_does(signed, expected):
    found = magnitude(Estimate(*signed, 8))
    assert (found.mean, found.lo, found.hi, found.n) == (*expected, 8)


def test_the_cache_of_an_episode_is_as_long_as_what_is_read():
    task, predictor = Ctrl(horizon=4), GPTPredictor(random_gpt(Ctrl(horizon=16)))
    task.grade(predictor, n=3, seed=0)
    assert predictor._caches[0].kv.size(4) == task.context_tokens
