"""Compare ctrl with scipy's normal distribution, a textbook Kalman filter and a blind policy."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from eval.rollout.policy import Predictor
from eval.rollout.tasks import ctrl
from eval.rollout.tasks.ctrl import Bins, Ctrl
from eval.rollout.tasks.references import OraclePredictor
from eval.rollout.tasks.task import TaskError
from tests.eval.rollout.tasks.oracles import both_rollouts

EXACT = 1e-12  # float64
N = 300
MIDDLE = 33 + 8  # the action of u = 0


class VelocityBlind(Predictor):
    """Act like the expert at the centre of the last angle's bin, but with ω = 0."""

    def __init__(self, task: Ctrl) -> None:
        self.environment = task.environment(1, 0)
        self.centres = Bins(task.obs_bins, ctrl.THETA_MAX).centres

    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        return self.read(prompts)

    def read(self, tokens: Tensor) -> Tensor:
        theta = self.centres[tokens[:, -1]]
        self.environment.estimate = torch.stack([theta, torch.zeros_like(theta)])
        return self.environment.oracle().log()


class TokenExpert(Predictor):
    """Compute the expert from tokens alone, one pendulum at a time.

    It uses the textbook form of the Kalman filter with explicit matrix products and inverses.
    """

    def __init__(self, task: Ctrl) -> None:
        self.task, self.plant = task, task.plant
        self.angles = Bins(task.obs_bins, ctrl.THETA_MAX)
        self.actions = Bins(task.action_bins, ctrl.U_MAX)

    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        self.states = [(np.zeros(2), np.diag(np.square(ctrl.START)))] * len(prompts)
        return self.laws(prompts[:, 0])

    def read(self, tokens: Tensor) -> Tensor:
        pushed = zip(self.states, tokens[:, 0].tolist(), strict=True)
        self.states = [self.predicted(*state, token - 33) for state, token in pushed]
        return self.laws(tokens[:, 1])

    def predicted(self, x: np.ndarray, P: np.ndarray, action: int) -> tuple:
        s, dt = self.plant.stiffness, ctrl.DT
        omega = x[1] + dt * (s * np.sin(x[0]) + self.actions.centres[action].item())
        A = np.array([[1, dt], [0, 1]]) @ np.array([[1, 0], [dt * s, 1]])  # ω first, then θ
        push = self.plant.noise * np.array([[dt], [1.0]])
        return np.array([x[0] + dt * omega, omega]), A @ P @ A.T + push @ push.T

    def corrected(self, x: np.ndarray, P: np.ndarray, angle: int) -> tuple:
        H, R = np.array([[1.0, 0.0]]), np.array([[(2 * ctrl.THETA_MAX / 33) ** 2 / 12]])
        K = P @ H.T @ np.linalg.inv(H @ P @ H.T + R)  # (2, 1)
        return x + K @ (self.angles.centres[angle].numpy() - H @ x), (np.eye(2) - K @ H) @ P

    def laws(self, angles: Tensor) -> Tensor:
        read = zip(self.states, angles.tolist(), strict=True)
        self.states = [self.corrected(*state, angle) for state, angle in read]
        theta, omega = torch.tensor(np.array([x for x, _ in self.states])).T
        p = self.actions.masses(self.plant.expert(theta, omega), ctrl.ACTION_NOISE)
        return torch.nn.functional.pad(p, (33, 1)).log()


@pytest.fixture
def task():
    return Ctrl()


def act(task: Ctrl, tokens: list[int], n: int = N, seed: int = 0) -> ctrl.CtrlEnvironment:
    """Return the environment after all of its pendulums received the same tokens."""
    environment = task.environment(n, seed)
    for token in tokens:
        environment.step(torch.full((n,), token))
    return environment


def test_the_expert_has_no_gap_and_lives_the_same_episodes(task):
    predictor = OraclePredictor(task.environment(N, 0))
    data, own = both_rollouts(task, predictor, n=N, seed=0)
    assert own.tokens.equal(data.tokens)
    assert all(own.outcomes[key].equal(data.outcomes[key]) for key in data.outcomes)
    metrics = task.grade(predictor, n=N, seed=0).means()
    assert metrics["val_kl"] == metrics["illegal_share"] == 0
    assert metrics["failure"] == metrics["data_failure"]


def test_the_oracle_knows_nothing_that_the_tokens_do_not_say(task):
    metrics = task.grade(TokenExpert(task), n=100, seed=0).means()
    # The two filters round differently, and the KL is second order in the difference.
    assert metrics["val_kl"] == pytest.approx(0, abs=1e-10)
    assert metrics["failure"] == metrics["data_failure"]


@pytest.mark.parametrize("instance", range(4))
def test_the_expert_falls_rarely_and_a_policy_blind_to_velocity_falls_often(instance):
    task = Ctrl(instance=instance)
    data, own = both_rollouts(task, VelocityBlind(task), n=2000, seed=0)
    expert, blind = ({k: v.nanmean() for k, v in each.outcomes.items()} for each in (data, own))
    assert expert["failure"] < 0.01
    assert blind["failure"] > 0.5
    assert blind["action_error"] > 2 * expert["action_error"]
    assert blind["cost"] > 2 * expert["cost"]


def test_the_oracle_is_the_experts_law_over_the_bins(task):
    environment = task.environment(N, 0)
    p = environment.oracle().numpy()
    length = ctrl.GRAVITY / environment.plant.stiffness
    theta, omega = environment.estimate.numpy()
    u = -(ctrl.GRAVITY / length + ctrl.KAPPA**2) * theta - 2 * ctrl.KAPPA * omega
    law = stats.norm(np.clip(u, -ctrl.U_MAX, ctrl.U_MAX)[:, None], ctrl.ACTION_NOISE)
    edges = np.linspace(-ctrl.U_MAX, ctrl.U_MAX, 18)
    edges[[0, -1]] = -np.inf, np.inf
    assert p[:, 33:50] == pytest.approx(np.diff(law.cdf(edges)), abs=EXACT)
    assert (p[:, :33] == 0).all()
    assert (p[:, 50:] == 0).all()


def test_the_masses_of_the_bins_are_those_of_sampled_actions():
    bins, n = Bins(17, 10.0), 200_000
    mean = torch.tensor([-11.0, -0.3, 9.9], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    index = bins.index(mean + 1.5 * z)  # (n, 3)
    sampled = torch.stack([index.eq(i).double().mean(0) for i in range(17)], dim=1)
    p = bins.masses(mean, 1.5)
    assert ((sampled - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1 / n).all()


@pytest.mark.parametrize("bins", [Bins(33, 0.45), Bins(17, 10.0), Bins(2, 1.0)])
def test_bins_and_their_centres_are_inverse(bins):
    order = torch.arange(bins.n)
    assert bins.index(bins.centres).equal(order)
    x = torch.linspace(-bins.limit, bins.limit, 1001, dtype=torch.float64)
    off = (bins.centres[bins.index(x)] - x).abs()
    assert off.max() <= bins.limit / bins.n + EXACT
    beyond = torch.tensor([-99.0, 99.0], dtype=torch.float64)
    assert bins.index(beyond).tolist() == [0, bins.n - 1]


def test_angles_and_actions_take_turns_and_only_actions_are_scored(task):
    documents = task.documents(N, "train")
    assert documents.shape == (N, 64)
    assert set(documents[:, 0::2].unique().tolist()) <= set(range(33)) == set(task.unscored())
    assert documents[:, 1::2].min() >= 33
    assert documents[:, 1::2].max() < 50 == len(task.symbols())


def test_the_angles_of_a_document_are_the_environments_answers_to_its_actions(task):
    documents = task.documents(N, 0)
    environment = task.environment(N, 0)
    assert environment.prompts.equal(documents[:, :1])
    for t in range(1, 62, 2):
        assert environment.step(documents[:, t]).equal(documents[:, t + 1 : t + 2])
    assert not task.documents(N, 1).equal(documents)


def test_a_pendulum_does_what_the_equations_say(task):
    tokens = task.documents(1, 0)[
        0, 1:16:2
    ].tolist()  # few, because rounding errors nearly double every step
    environment, start = act(task, tokens, n=1), task.environment(1, 0)
    assert not environment.fallen
    theta, omega = start.theta.item(), start.omega.item()
    cost = error = 0.0
    for i, (token, push) in enumerate(zip(tokens, start.pushes[:8, 0].tolist(), strict=True)):
        believed = act(task, tokens[:i], n=1).estimate[:, 0].tolist()
        u = (token - MIDDLE) * 2 * ctrl.U_MAX / 17
        cost += theta**2 + 0.1 * omega**2 + 0.001 * u**2
        expected = (
            -(task.plant.stiffness + ctrl.KAPPA**2) * believed[0] - 2 * ctrl.KAPPA * believed[1]
        )
        error += (u - min(max(expected, -ctrl.U_MAX), ctrl.U_MAX)) ** 2
        omega += ctrl.DT * (task.plant.stiffness * math.sin(theta) + u) + push
        theta += ctrl.DT * omega
    assert (environment.theta.item(), environment.omega.item()) == pytest.approx(
        (theta, omega), abs=EXACT
    )
    outcomes = environment.outcomes()
    assert outcomes["cost"].item() == pytest.approx(cost / 8, rel=EXACT)
    assert outcomes["action_error"].item() == pytest.approx(error / 8, rel=EXACT)


@pytest.mark.parametrize("token", [0, 32, 50])
def test_a_token_that_is_no_action_is_illegal_and_pushes_nothing(task, token):
    environment, still = act(task, [token] * 3), act(task, [MIDDLE] * 3)
    assert environment.theta.equal(still.theta)
    assert (environment.outcomes()["illegal_share"] == 1).all()
    assert (still.outcomes()["illegal_share"] == 0).all()


def test_a_fallen_pendulum_stays_where_it_fell_and_is_not_graded(task):
    early, late = (
        act(task, [49] * 16),
        act(task, [49] * 16 + [33] * 16),
    )  # full power in one direction
    assert early.fallen.all()
    assert (early.theta == ctrl.THETA_MAX).all()
    assert late.theta.equal(early.theta)
    before, after = early.outcomes(), late.outcomes()
    for key in ("failure", "action_error", "illegal_share"):
        assert after[key].equal(before[key])
    expected = (before["cost"] + ctrl.THETA_MAX**2) / 2
    assert after["cost"].numpy() == pytest.approx(expected.numpy(), rel=EXACT)


def test_a_rollout_grades_decisions_up_to_the_fall(task):
    _, own = both_rollouts(task, VelocityBlind(task), n=N, seed=0)
    graded = ~own.error.isnan()
    assert (graded.int().diff(dim=1) <= 0).all()
    # a fall at the last decision has no ungraded decisions after it
    assert own.outcomes["failure"][~graded[:, -1]].all()
    assert (~graded[:, -1]).sum() > 0.5 * N


def test_instances_are_plants_within_the_documented_range():
    plants = [Ctrl(instance=i).plant for i in range(50)]
    lengths = np.array([ctrl.GRAVITY / plant.stiffness for plant in plants])
    noises = np.array([plant.noise for plant in plants])
    for values, (low, high) in ((lengths, ctrl.LENGTHS), (noises, ctrl.NOISES)):
        assert low <= values.min() < values.max() <= high
        assert np.ptp(values) > 0.8 * (high - low)


def test_impossible_knobs_are_one_error():
    with pytest.raises(TaskError, match=r"horizon=0: .* 1; obs_bins=1: .* 1024; action_bins=2000"):
        Ctrl(horizon=0, obs_bins=1, action_bins=2000)
