"""Test the linear system: its exact grades, and policies that learn or diverge."""

import math
import shlex

import numpy as np
import pytest
import torch

from eval.rollout.tasks.lds import Lds, grade_policy
from optim.build import OPTIMIZERS
from studies.sweep.lds import LdsTrial, _demonstrations, main, train_policy

EXACT = 1e-9  # float64, relative, through up to 100 products of well-scaled matrices
RATES = {"sgd": 0.01, "adamw": 0.01, "signum": 0.003, "muon": 0.03, "adamuon": 0.03}


@pytest.fixture(scope="module")
def lds():
    return Lds(horizon=12)


@pytest.fixture(scope="module")
def policy(lds):
    """Return the expert with an error in every direction."""
    error = np.random.default_rng(0).standard_normal(lds.expert.shape)
    return lds.expert + 0.05 * error


def simulate(lds, K, start, noise):
    """Return s' - s*', (K - K*) s, s' and K s of N episodes, each (H, N, ...)."""
    own, experts, columns = start, start, []
    for w in noise:  # (N, n)
        action = own @ K.T
        errors = own @ (K - lds.expert).T
        own = own @ lds.A.T + action @ lds.B.T + w
        experts = experts @ (lds.A + lds.B @ lds.expert).T + w
        columns.append((own - experts, errors, own, action))
    return map(np.stack, zip(*columns, strict=True))


def square(x):  # (..., d) -> (...)
    return (x**2).sum(-1)


@pytest.mark.parametrize("instance", range(5))
def test_the_plant_is_unstable_and_the_expert_stabilises_it(instance):
    lds = Lds(instance=instance)
    assert np.linalg.eigvalsh(lds.A)[-2:] == pytest.approx([1.1, 1.1])
    closed = lds.A + lds.B @ lds.expert
    assert abs(np.linalg.eigvals(closed)).max() == pytest.approx(0.9)
    residual = closed @ lds.sigma @ closed.T + lds.W - lds.sigma
    assert abs(residual).max() < EXACT * abs(lds.sigma).max()


@pytest.mark.parametrize("instance", range(5))
def test_a_policy_without_the_stabiliser_has_a_low_loss_and_diverges(instance):
    lds = Lds(instance=instance)
    nothing = lds.val_loss(np.zeros_like(lds.expert))
    assert lds.val_loss(lds.distractor) < 1e-3 * nothing
    assert grade_policy(lds, lds.distractor).means()["deviation"] > 100


def test_the_distractor_does_not_act_on_the_special_modes(lds):
    effect = lds.modes.T @ lds.B @ lds.distractor
    assert abs(effect[[0, 1, -2, -1]]).max() < 1e-12
    assert abs(effect).max() > 0.01


def test_the_expert_has_no_loss_deviation_or_gap():
    lds = Lds()
    metrics = grade_policy(lds, lds.expert).means()
    assert metrics.pop("log10_deviation") == -math.inf
    assert metrics == {"val_loss": 0, "deviation": 0, "cost_ratio": 1, "gap": 0}


def test_the_exact_expectations_are_sums_over_all_sources_of_noise(lds, policy):
    """Each episode has one source of noise: a column of a root of its covariance."""
    n, H = lds.states, lds.horizon
    sources = np.zeros((1 + H, (1 + H) * n, n))
    for t, covariance in enumerate([lds.sigma] + [lds.W] * H):
        sources[t, t * n : (t + 1) * n] = np.linalg.cholesky(covariance).T
    deviation, errors, states, actions = simulate(lds, policy, sources[0], sources[1:])
    exact = lds.rollouts(policy)
    assert exact.deviation == pytest.approx(square(deviation).sum(1), rel=EXACT)
    assert exact.action_error == pytest.approx(square(errors).sum(1), rel=EXACT)
    assert exact.cost == pytest.approx((square(states) + square(actions)).sum(1), rel=EXACT)


def test_a_grade_has_the_mean_deviation_and_the_gap_at_the_end_of_its_curves(lds, policy):
    grade, exact = grade_policy(lds, policy), lds.rollouts(policy)
    means = grade.means()
    assert means["deviation"] == pytest.approx(exact.deviation.mean() / lds.sigma.trace())
    assert means["log10_deviation"] == pytest.approx(math.log10(means["deviation"]))
    assert grade.curves["A"].mean[-1] == pytest.approx(means["val_loss"] * lds.horizon)
    assert grade.curves["G"].mean[-1] == means["gap"]


def test_at_horizon_one_both_errors_are_equal(policy):
    grade = grade_policy(Lds(horizon=1), policy)
    assert grade.curves["B"].mean == pytest.approx(grade.curves["A"].mean, rel=EXACT)


@pytest.mark.parametrize("dopr", [{}, {"gamma": 1e-3}], ids=["base", "dopr"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_reduces_the_loss(lds, optimizer, dopr):
    nothing = lds.val_loss(np.zeros_like(lds.expert))
    K = train_policy(lds, optimizer, RATES[optimizer], 0, steps=60, **dopr)
    assert lds.val_loss(K) < 0.2 * nothing


def test_with_huge_damping_dopr_is_the_base_optimizer_at_another_rate(lds):
    gamma = 1e9
    base = train_policy(lds, "sgd", 0.003, 0, steps=20)
    dopr = train_policy(lds, "sgd", 0.003 * gamma, 0, steps=20, gamma=gamma)
    assert dopr == pytest.approx(base, abs=1e-6 * abs(base).max())  # Σ is 1e-8 of the damping


def test_training_depends_only_on_the_seed_and_keeps_the_global_random_state(lds):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = train_policy(lds, "adamw", 0.01, 0, steps=3)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(6)
    assert (train_policy(lds, "adamw", 0.01, 0, steps=3) == first).all()
    assert (train_policy(lds, "adamw", 0.01, 1, steps=3) != first).any()


def test_a_run_that_diverges_is_graded_infinite(lds):
    K = train_policy(lds, "sgd", 100.0, 0)
    assert np.isnan(K).all()
    grade = grade_policy(lds, K)
    assert set(grade.means().values()) == {math.inf}
    assert set(grade.curves["G"].mean) == {math.inf}


def test_a_finite_policy_whose_rollouts_overflow_is_graded_infinite():
    lds = Lds()
    metrics = grade_policy(lds, lds.expert + 1e3).means()
    assert math.isfinite(metrics.pop("val_loss"))
    assert set(metrics.values()) == {math.inf}


def test_all_impossible_sizes_are_in_one_error():
    with pytest.raises(
        ValueError, match=r"horizon=0: .* 1; states=4: .* 5; .*actions=5: .* 6.*excitation=0:"
    ):
        Lds(horizon=0, states=4, actions=5, excitation=0)


def test_excitation_is_the_variance_of_the_noise_in_the_unstable_modes():
    lds = Lds(excitation=0.01)
    assert np.linalg.eigvalsh(lds.W)[[0, -1]] == pytest.approx([0.01, 1.0])
    quietest = lds.modes[:, 0]
    assert quietest @ lds.W @ quietest == pytest.approx(0.01)
    assert quietest @ lds.A @ quietest == pytest.approx(1.1)


@pytest.mark.parametrize("seed", range(3))
def test_demonstrations_share_no_random_number_with_the_plant(seed):
    lds = Lds()
    states, _ = _demonstrations(lds, seed, 1)[0]
    drawn = np.linalg.solve(np.linalg.cholesky(lds.sigma), states.numpy().T).T.ravel()[:16]
    for stream in range(3):  # modes, B, distractor
        plants = np.random.default_rng([lds.instance, stream]).standard_normal(400)
        assert abs(drawn[:, None] - plants).min(1).max() > 1e-6


@pytest.mark.parametrize("name", ["adamw+gamma=0.1", "dopr-sgd+momentum=0", "adamw+beta1=0.8"])
def test_a_variant_can_only_change_numbers_of_dopr(name):
    assert dict(LdsTrial.parse_variant("dopr-adamw+gamma=0.001").settings)["gamma"] == 1e-3
    with pytest.raises(ValueError, match="task lds has no"):
        LdsTrial.parse_variant(name)


def test_the_command_of_a_record_repeats_its_run(tmp_path, capsys):
    lds = Lds(instance=7, horizon=12)
    K = train_policy(lds, "adamw", 0.1 / 512, 3, steps=5, gamma=0.1)
    names = {"variant": "dopr-adamw+gamma=0.1", "base": "adamw", "role": "fresh"}
    numbers = {"lr": 0.1 / 512, "seed": 3, "settings": {"max_steps": 5}, "n": 1}
    trial = LdsTrial(folder=tmp_path, task=lds, **names, **numbers)
    main(shlex.split(trial.repeat_command)[4:])
    assert f"val_loss {grade_policy(lds, K).means()['val_loss']!r} " in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--lr", "0"], ["--optimizer", "adamm"], ["--task", "lds,x=1"]])
def test_a_wrong_command_is_refused(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--optimizer", "adamw", "--lr", "0.01", *wrong])
    assert "error: " in capsys.readouterr().err
