"""Test rollouts: the drawn tokens, the measurements and the two kinds of contexts."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from eval.rollout.environment import Environment, draw, kl, rollout
from eval.rollout.policy import GPTPredictor, Predictor
from eval.rollout.tasks.chain import Chain
from eval.rollout.tasks.nav import Nav
from eval.rollout.tasks.pdfa import Pdfa
from eval.rollout.tasks.references import OraclePredictor
from eval.rollout.tasks.task import OracleTask
from tests.eval.rollout.tasks.oracles import Bent, both_rollouts, random_gpt, smoothed

TASKS = [Pdfa(horizon=12), Nav(nodes=24, horizon=16), Chain()]
EXACT = 1e-12  # float64, a sum over a dozen tokens
FLOAT32 = 1e-5  # a float32 GPT with other batch sizes

every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def distributions(n: int, V: int, seed: int = 0) -> np.ndarray:
    """Draw distributions (n, V) float64 with about a quarter of zeros."""
    random = np.random.default_rng(seed)
    p = random.gamma(1.0, size=(n, V)) * (random.random((n, V)) > 0.25)
    p[:, 0] += 1e-3
    return p / p.sum(1, keepdims=True)


def test_evenly_spread_uniforms_draw_every_token_in_proportion():
    n, (p,) = 10_000, distributions(1, 7)
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = draw(torch.from_numpy(p).expand(n, -1), uniforms)
    counts = np.bincount(drawn.numpy(), minlength=7)
    assert np.abs(counts - n * p).max() <= 1  # an interval of length p holds n p +- 1 points


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_a_token_without_probability_is_never_drawn(u):
    p = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0, 0, 0, 1.0]])
    tokens = draw(p.double(), torch.full((3,), u, dtype=torch.float64))
    assert tokens.tolist() == ([1, 0, 4] if u == 0 else [3, 0, 4])


def test_kl_equals_scipy_with_zeros_in_the_oracle():
    q, p = distributions(50, 9), distributions(50, 9, seed=1) + 0.01
    ours = kl(torch.from_numpy(q), torch.from_numpy(p / p.sum(1, keepdims=True)).log())
    assert ours.numpy() == pytest.approx(stats.entropy(q, p, axis=1), rel=EXACT)


def test_kl_is_infinite_where_the_model_rules_out_what_happens():
    q, p = torch.tensor([[0.5, 0.5], [0.0, 1.0]]).double(), torch.tensor([[1.0, 0.0]] * 2).double()
    assert kl(q, p.log()).tolist() == [torch.inf, torch.inf]
    assert kl(q, q.log()).tolist() == [0.0, 0.0]


def written(task: OracleTask, environment: Environment, decisions: Tensor) -> Tensor:
    """Write the document (B, document_tokens) that results from the decisions."""
    parts = [environment.prompts]
    for token in decisions.unbind(1):
        parts += [token[:, None], environment.step(token)]
    return torch.cat(parts, dim=1)[:, : task.document_tokens]


@every_task
@pytest.mark.parametrize("actor", ["oracle", "model"])
def test_a_rollout_measures_what_a_full_forward_says(task, actor):
    model, environment = random_gpt(task), task.environment(32, 5)
    episodes = rollout(environment, GPTPredictor(model), task.uniforms(32, 5), actor)
    document = written(task, task.environment(32, 5), episodes.tokens)
    with torch.no_grad():
        logits = model(document[:, :-1], torch.zeros_like(document[:, 1:]))[0]
    log_p = logits.double().log_softmax(-1).numpy()  # (B, L - 1, V)
    log_p = log_p[:, task.prompt_tokens - 1 :: 1 + task.answer_tokens]  # (B, H, V)
    entropy = stats.entropy(np.exp(log_p), axis=-1)
    nll = -np.take_along_axis(log_p, episodes.tokens[..., None].numpy(), axis=-1)[..., 0]
    ended = episodes.nll.isnan().numpy()
    for ours, expected in ((episodes.nll, nll), (episodes.entropy, entropy)):
        assert np.abs(ours.numpy() - expected)[~ended].max() < FLOAT32


def sharpened(p: Tensor) -> Tensor:
    """Square the probabilities and normalise, which keeps zeros."""
    return p**2 / (p**2).sum(-1, keepdim=True)


@every_task
@pytest.mark.parametrize("bend", [smoothed, sharpened])
def test_the_errors_are_the_kls_to_the_oracle_of_that_very_history(task, bend):
    predictor = Bent(OraclePredictor(task.environment(16, 0)), bend)
    episodes = rollout(task.environment(16, 0), predictor, task.uniforms(16, 0), "model")
    environment = task.environment(16, 0)
    for t in range(task.horizon):
        q = environment.oracle()
        pairs = (episodes.error, q, bend(q)), (episodes.reverse, bend(q), q)
        for ours, p, other in pairs:
            expected = torch.from_numpy(stats.entropy(p.numpy(), other.numpy(), axis=1))
            expected[environment.has_ended()] = torch.nan
            close = {"rtol": EXACT, "atol": EXACT, "equal_nan": True}
            torch.testing.assert_close(ours[:, t], expected, **close)
        environment.step(episodes.tokens[:, t])


@every_task
@pytest.mark.parametrize("batch_size", [1, 7, 16])
def test_batches_of_any_size_predict_the_same(task, batch_size):
    model, environment = random_gpt(task), task.environment(16, 0)
    whole, parts = GPTPredictor(model), GPTPredictor(model, batch_size)
    assert (
        whole.start(environment.prompts) - parts.start(environment.prompts)
    ).abs().max() < FLOAT32
    for tokens in task.documents(16, 0)[:, environment.prompts.size(1) :].split(3, dim=1)[:-1]:
        assert (whole.read(tokens) - parts.read(tokens)).abs().max() < FLOAT32


@every_task
def test_on_the_datas_contexts_the_model_changes_nothing(task):
    predictor = GPTPredictor(random_gpt(task))
    episodes = rollout(task.environment(8, 3), predictor, task.uniforms(8, 3), "oracle")
    assert written(task, task.environment(8, 3), episodes.tokens).equal(task.documents(8, 3))


@every_task
def test_a_model_that_equals_the_oracle_has_the_same_episodes(task):
    data, own = both_rollouts(task, OraclePredictor(task.environment(64, 0)), n=64, seed=0)
    assert own.tokens.equal(data.tokens)
    assert own.error.nan_to_num().abs().max() < EXACT


@every_task
def test_the_first_decision_has_the_same_context_for_both(task):
    data, own = both_rollouts(task, GPTPredictor(random_gpt(task)), n=64, seed=0)
    assert own.error[:, 0].equal(data.error[:, 0])
    assert not own.tokens.equal(data.tokens)


class Doubling(Environment):
    """Answer each of a sequence of binary decisions with two tokens."""

    def __init__(self, B: int) -> None:
        self.prompts = torch.zeros(B, 3, dtype=torch.int64)

    def oracle(self) -> Tensor:
        return torch.tensor([0.5, 0.5]).double().expand(len(self.prompts), -1)

    def step(self, tokens: Tensor) -> Tensor:
        return torch.stack([1 - tokens, tokens], dim=1)

    def has_ended(self) -> Tensor:
        return torch.zeros(len(self.prompts), dtype=torch.bool)

    def outcomes(self) -> dict[str, Tensor]:
        return {}


class Recorder(Predictor):
    """Predict uniformly and record what was read."""

    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        self.seen = []
        return self.read(prompts)

    def read(self, tokens: Tensor) -> Tensor:
        self.seen.append(tokens)
        return torch.tensor([0.5, 0.5]).double().log().expand(len(tokens), -1)


def test_the_model_reads_each_decision_and_answer_except_the_last():
    recorder, uniforms = Recorder(), torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    episodes = rollout(Doubling(5), recorder, uniforms.double(), "model")
    prompts, *read = recorder.seen
    assert prompts.shape == (5, 3)
    assert len(read) == 3
    for t, tokens in enumerate(read):
        token = episodes.tokens[:, t]
        assert tokens.equal(torch.stack([token, 1 - token, token], dim=1))
