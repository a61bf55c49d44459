"""Test that a step of the real preconditioner contracts what is outside the features for any Σ.

The oracles are the formulas of studies/feature_learning/task.py and SciPy's principal angles.
"""

import json
import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import nn

import studies.feature_learning.study as study
from optim import ActivationPreconditioner, Muon
from studies.feature_learning.__main__ import RESULTS, main
from studies.feature_learning.figure import draw
from studies.feature_learning.study import Setup, equal_loss_distances, measure, ratio, run
from studies.feature_learning.task import FEATURES, INPUTS, OUTPUTS, distance, make_task
from studies.feature_learning.training import Curve, train

D, M, K = INPUTS, OUTPUTS, FEATURES
EXACT = {"rtol": 0, "atol": 1e-9}  # float64; the weights are about 1 and Σ's condition at most 100


def gaussian(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def exact_batch(task, n=64):
    """Return inputs whose second moment is Σ exactly, and their outputs without noise."""
    Q = torch.linalg.qr(gaussian(n, D, seed=5))[0]
    x = math.sqrt(n) * Q @ task.root
    return x, x @ (task.F @ task.G).mT


def trained(task, F, G, make_optimizer, *, dopr):
    """Return G after one step on the exact batch, with F fixed."""
    model = nn.Sequential(nn.Linear(D, K, bias=False), nn.Linear(K, M, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(G)
        model[1].weight.copy_(F)
    model[1].requires_grad_(False)
    optimizer = make_optimizer([model[0].weight])
    if dopr:
        preconditioner = ActivationPreconditioner(model, gamma=0, trace_normalized=False)
        preconditioner.attach(optimizer)
    x, y = exact_batch(task)
    ((model(x) - y).square().sum(1).mean() / 2).backward()
    optimizer.step()
    return model[0].weight.detach()


def sgd(lr):
    return lambda params: torch.optim.SGD(params, lr=lr)


def outside(task):
    """Return N, which projects onto what the task ignores."""
    return torch.eye(D, dtype=torch.float64) - task.G.mT @ task.G


def random_weights():
    return gaussian(M, K, seed=1) / 4, gaussian(K, D, seed=2) / 4


@pytest.mark.parametrize("condition", [1, 10, 100])
def test_dopr_sgd_contracts_what_is_outside_by_a_factor_without_the_covariance(condition):
    task, (F, G), lr = make_task(condition, 0, seed=3), random_weights(), 0.3
    contracted = (torch.eye(K, dtype=torch.float64) - lr * F.mT @ F) @ G @ outside(task)
    stepped = trained(task, F, G, sgd(lr), dopr=True)
    torch.testing.assert_close(stepped @ outside(task), contracted, **EXACT)
    assert (G @ outside(task) - contracted).norm() > 0.1  # the step does move G


@pytest.mark.parametrize("condition", [1, 100])
def test_sgd_contracts_by_the_variance_and_mixes_features_with_the_rest(condition):
    task, (F, G), lr = make_task(condition, 0, seed=3), random_weights(), 0.3
    N, sigma = outside(task), task.root @ task.root
    uneven = F.mT @ F @ G @ N @ sigma @ N
    mixed = F.mT @ (F @ G @ task.G.mT - task.F) @ task.G @ sigma @ N
    stepped = trained(task, F, G, sgd(lr), dopr=False)
    torch.testing.assert_close(stepped @ N, G @ N - lr * (uneven + mixed), **EXACT)
    assert (mixed.norm() > 0.1) == (condition > 1)


def test_sgd_keeps_an_error_of_low_variance_that_dopr_removes_in_one_step():
    task = make_task(100, 0, seed=3)
    N = outside(task)
    variances, U = torch.linalg.eigh(N @ task.root @ task.root @ N)
    slow, fast = variances[K], variances[-1]  # the first K eigenvectors are the features
    assert fast / slow > 20
    for variance, u in ((slow, U[:, K]), (fast, U[:, -1])):
        G = task.G + 0.1 * torch.outer(torch.ones(K, dtype=torch.float64), u)
        left = trained(task, task.F, G, sgd(1 / float(fast)), dopr=False) @ u
        expected = torch.full_like(left, 0.1 * float(1 - variance / fast))
        torch.testing.assert_close(left, expected, **EXACT)
        removed = trained(task, task.F, G, sgd(1.0), dopr=True)
        assert distance(removed, task.G) < 1e-9 < 0.05 < distance(G, task.G)


def test_only_sgd_under_anisotropy_leaves_a_row_space_that_is_right():
    F = gaussian(M, K, seed=1)

    def left_by(condition, dopr):
        task = make_task(condition, 0, seed=3)
        return distance(trained(task, F, task.G, sgd(0.01), dopr=dopr), task.G)

    assert left_by(100, dopr=False) > 0.05
    assert left_by(1, dopr=False) < 1e-9
    assert left_by(100, dopr=True) < 1e-9


def test_a_right_row_space_survives_dopr_muon_but_not_muon_or_dopr_adamw():
    task, F = make_task(100, 0, seed=3), gaussian(M, K, seed=1)

    def left_by(make_optimizer, dopr=True):
        return distance(trained(task, F, task.G, make_optimizer, dopr=dopr), task.G)

    def muon(params):
        return Muon(params, lr=0.1, weight_decay=0, ns_dtype="float32")

    assert left_by(muon) < 1e-5  # float32
    assert left_by(muon, dopr=False) > 0.05
    assert left_by(lambda params: torch.optim.AdamW(params, lr=0.05)) > 0.05


def test_with_a_fitted_f_the_tangents_of_the_angles_contract():
    task, G, lr = make_task(100, 0, seed=3), gaussian(K, D, seed=2) / 4, 0.2
    A = G @ task.G.mT + torch.eye(K, dtype=torch.float64)
    G = A @ task.G + G @ outside(task)
    F = task.F @ A.inverse()

    def tangents(own):
        return (own @ task.G.mT).inverse() @ own @ outside(task)

    stepped = trained(task, F, G, sgd(lr), dopr=True)
    factor = torch.eye(K, dtype=torch.float64) - lr * A.inverse() @ F.mT @ F @ A
    torch.testing.assert_close(tangents(stepped), factor @ tangents(G), **EXACT)
    for own in (G, stepped):
        tangent = float(torch.linalg.matrix_norm(tangents(own), 2))
        assert distance(own, task.G) == pytest.approx(math.sin(math.atan(tangent)))
    assert distance(stepped, task.G) < 0.99 * distance(G, task.G)


def test_the_distance_is_the_sine_of_the_largest_principal_angle():
    task, G = make_task(10, 0, seed=3), gaussian(K, D, seed=2)
    for own in (G, task.G + 0.1 * G, task.G + 1e-6 * G):
        largest = np.sin(subspace_angles(own.T.numpy(), task.G.T.numpy()).max())
        assert distance(own, task.G) == pytest.approx(largest, rel=1e-6)
    assert distance(gaussian(K, K, seed=4) @ task.G, task.G) < 1e-12
    assert distance(G @ outside(task), task.G) == pytest.approx(1)
    one_is_outside = torch.cat([task.G[1:], G[:1] @ outside(task)])
    assert distance(one_is_outside, task.G) == pytest.approx(1)  # the largest angle counts


def test_the_inputs_have_the_condition_and_the_loss_is_the_expected_one():
    task, (F, G) = make_task(100, 0.5, seed=3), random_weights()
    eigenvalues = torch.linalg.eigvalsh(task.root @ task.root)
    assert eigenvalues.mean() == pytest.approx(1)
    assert eigenvalues[-1] / eigenvalues[0] == pytest.approx(100)
    x, y = task.draw(100_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x.mT @ x / len(x), task.root @ task.root, rtol=0, atol=0.2)
    sampled = float((x @ (F @ G).mT - y).square().sum(1).mean() / 2)
    assert sampled - M * 0.5**2 / 2 == pytest.approx(task.loss(F, G), rel=0.02)
    assert task.loss(task.F, task.G) == 0


def test_the_noise_and_the_covariance_do_not_change_the_true_weights():
    one, other = make_task(1, 0, seed=3), make_task(100, 0.5, seed=3)
    assert torch.equal(one.F, other.F)
    assert torch.equal(one.G, other.G)
    assert not torch.equal(one.G, make_task(1, 0, seed=4).G)


def test_the_distance_at_a_loss_is_interpolated_where_it_is_first_reached():
    curve = Curve(20, [1.0, 0.1, 0.001, 0.01, 0.0001], [1.0, 0.8, 0.2, 0.5, 0.1])
    assert curve.has_finished
    assert curve.distance_at(0.1) == pytest.approx(0.8)
    assert curve.distance_at(0.01) == pytest.approx(0.4)  # the geometric mean of 0.8 and 0.2
    assert curve.distance_at(2.0) == 1.0
    assert math.isnan(curve.distance_at(1e-5))
    other = Curve(20, [1.0, 0.5, 0.4, 0.2, 0.01], [1.0, 0.9, 0.9, 0.9, 0.3])
    assert equal_loss_distances(curve, other) == pytest.approx((0.4, 0.3))
    assert equal_loss_distances(other, curve) == pytest.approx((0.3, 0.4))
    assert all(map(math.isnan, equal_loss_distances(curve, Curve(20, [1.0], [1.0]))))


def test_ratios_are_paired_and_leave_out_runs_that_diverged():
    found = ratio([(2.0, 1.0), (None, 1.0), (8.0, 4.0), (2.0, None), (0.2, 0.1)])
    assert (found.mean, found.lo, found.hi, found.n) == pytest.approx((2, 2, 2, 3))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_training_approaches_the_features_and_depends_only_on_the_seed(optimizer):
    rate = study.RATES[optimizer][1]
    curve = run(Setup(0.1, 10, 100, optimizer), rate, 1, "base")
    assert curve.distances[-1] < 0.4 < 0.8 < curve.distances[0]
    assert run(Setup(0.1, 10, 100, optimizer), rate, 1, "base") == curve
    base, exact = (run(Setup(0.1, 10, 10, optimizer), rate, 1, mode) for mode in ("base", "exact"))
    assert base.losses[0] == exact.losses[0]
    assert base.losses[1] != exact.losses[1]


def test_a_run_that_diverges_ends_and_has_not_finished():
    task = make_task(10, 0, seed=3)
    curve = train(task, "sgd", 1e3, 0, {})
    assert not curve.has_finished
    assert len(curve.losses) < 21


def test_a_study_compares_each_mode_with_its_base_at_the_best_rate(monkeypatch):
    monkeypatch.setattr(study, "SETUPS", [Setup(0.0, 10, 10, "adamw")])
    monkeypatch.setattr(study, "FRESH_SEEDS", (1, 2, 3))
    rows = list(measure())
    assert [row["mode"] for row in rows] == list(study.MODES)
    for row in rows:
        rates = sorted(row["sweep"], key=row["sweep"].__getitem__)
        assert rates[0] == row["lr"]
        assert min(row["sweep"]) < row["lr"] < max(row["sweep"])
        assert len(row["losses"]) == len(row["at_equal_loss"]) == 3
    for row in rows:
        is_equal = [own == base for own, base in row["at_equal_loss"]]
        assert is_equal == [row["mode"] == "base"] * 3
    assert study.table_of(rows).count("| adamw |") == 3
    result = {"rows": rows, "run": {"record_every": 5}}
    above, below = draw(result).axes
    assert [len(ax.lines) for ax in (above, below)] == [2, 2]
    assert above.lines[0].get_ydata() == pytest.approx(rows[0]["distances_over_steps"])


def test_the_committed_results_are_complete_and_those_of_the_command():
    rows = json.loads(RESULTS.read_text())["rows"]
    keys = [(*(row[key] for key in Setup._fields), row["mode"]) for row in rows]
    assert keys == [(*setup, mode) for setup in study.SETUPS for mode in study.MODES]
    row = rows[keys.index((0.0, 10, 100, "sgd", "exact"))]
    curve = run(Setup(0.0, 10, 100, "sgd"), row["lr"], study.FRESH_SEEDS[0], "exact")
    assert curve.losses[-1] == pytest.approx(row["losses"][0], rel=0.01)
    assert curve.distances[-1] == pytest.approx(row["distances"][0], rel=0.01)


def test_the_command_prints_the_committed_table_and_draws(tmp_path, capsys):
    main(["--figure", str(tmp_path / "figure.svg")])
    assert "<svg" in (tmp_path / "figure.svg").read_text()
    assert capsys.readouterr().out.count("| G alone |") == len(study.SETUPS)
