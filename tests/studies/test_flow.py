"""Test the flow models: the exact velocity, samples, grades, training and comparisons."""

import copy
import json
import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from studies.flow import runs, study
from studies.flow.axes import split_by_axes
from studies.flow.comparison import log_ratio, matched
from studies.flow.figure import RESULTS, curve_of
from studies.flow.grading import Grader, in_float32
from studies.flow.mixture import Mixture
from studies.flow.runs import MODES, FlowResults, Run, train_and_grade
from studies.flow.sampling import integrate, time_grid
from studies.flow.targets import DIMENSIONS, THICKNESS, make_target
from studies.flow.training import draw_pairs, train_field

pytestmark = pytest.mark.xdist_group("flow")  # its fixtures are slow

EXACT = 1e-9  # float64, relative
FIRST = (100, 125)  # seed and steps of the shortest runs of the results
RUN = Run("cond-100", "adamw", "base", 4e-3, 100, 125)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def small_mixture():
    """Return three Gaussians in three dimensions with unequal weights and covariances."""
    roots = normal(3, 3, 3)
    covariances = roots @ roots.mT + 0.05 * torch.eye(3, dtype=torch.float64)
    mixture = Mixture.of(2 * normal(3, 3, seed=1), covariances)
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    return Mixture(weights, mixture.means, mixture.axes, mixture.variances), covariances


@pytest.fixture(scope="module")
def grader():
    return Grader(make_target("cond-100", 3))


@pytest.mark.parametrize("t", [0.02, 0.5, 0.97, 1.0])
def test_the_velocity_agrees_with_the_score_of_the_density(t):
    """With the score s of x_t, E[x_0 | x] = -(1 - t) s, so the velocity is (x + (1 - t) s) / t."""
    mixture, covariances = small_mixture()
    noise = (1 - t) ** 2 * torch.eye(3, dtype=torch.float64)
    parts = MultivariateNormal(t * mixture.means, t**2 * covariances + noise)
    x = normal(50, 3, seed=2).requires_grad_()
    log_density = MixtureSameFamily(Categorical(mixture.weights), parts).log_prob(x)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    expected = (x + (1 - t) * score) / t
    found = mixture.velocity(x.detach(), torch.full((50,), t, dtype=torch.float64))
    torch.testing.assert_close(found, expected.detach(), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", ["cond-10000", "curve"])
def test_the_velocity_is_the_regression_of_the_training_pairs(name):
    """The residual is uncorrelated with functions of (x_t, t), up to five standard errors."""
    mixture = make_target(name, 0).mixture
    x, t, conditional = draw_pairs(mixture, 40, generator())
    residual = conditional.double() - mixture.velocity(x, t)  # (n, d)
    for weight in (torch.ones_like(t), t, x[:, 0], x[:, 1] * t, x.square().sum(1).sqrt()):
        product = residual * weight[:, None]
        standard_error = product.std(0) / math.sqrt(len(product))
        assert (product.mean(0).abs() < 5 * standard_error).all()


def test_heun_follows_the_closed_form_map_of_one_gaussian():
    """Along every axis of the covariance, z(t) = t m + sqrt((1 - t)² + t² variance) z(0)."""
    d = 6
    root = torch.linalg.qr(normal(d, d)).Q * torch.logspace(-1, 0.5, d, dtype=torch.float64)
    mean = normal(1, d, seed=1)
    mixture = Mixture.of(mean, (root @ root.T)[None])
    noise = normal(100, d, seed=2)
    axes, variances = mixture.axes[0], mixture.variances[0]
    expected = mean + (noise @ axes * variances.sqrt()) @ axes.T
    errors = [(integrate(mixture.velocity, noise, n) - expected).abs().max() for n in (64, 128)]
    assert errors[0] < 0.05
    assert errors[1] < 0.3 * errors[0]  # second order: a quarter


@pytest.mark.parametrize("name", ["cond-1", "cond-10000", "curve"])
def test_the_exact_field_transports_noise_to_the_data(name):
    """Means and second moments, in units of the data, agree up to five standard errors."""
    mixture = make_target(name, 1).mixture
    samples = integrate(mixture.velocity, normal(400, DIMENSIONS))
    spread = mixture.axes * mixture.variances[:, None, :] @ mixture.axes.mT
    second = (spread + mixture.means[:, :, None] * mixture.means[:, None, :]).mean(0)
    values, axes = torch.linalg.eigh(second)
    z = samples @ axes / values.sqrt()  # second moment I
    for products, expected in (
        (z, mixture.means.mean(0) @ axes / values.sqrt()),
        (z[:, :, None] * z[:, None, :], torch.eye(DIMENSIONS, dtype=torch.float64)),
    ):
        error = (products.mean(0) - expected).abs()
        # Thin directions also have a small error of the integration.
        assert (error < 5 * products.std(0) / math.sqrt(len(z)) + 0.02).all()


@pytest.mark.parametrize("condition", [1, 100, 1e4])
def test_a_stretched_mixture_has_the_condition_number_and_turned_axes(condition):
    mixture = make_target(f"cond-{condition:g}", 5).mixture
    ratio = mixture.variances.amax(1) / mixture.variances.amin(1)
    torch.testing.assert_close(ratio, torch.full_like(ratio, condition), rtol=1e-6, atol=0)
    if condition > 1:
        assert mixture.axes[0].abs().max() < 0.95


def test_the_samples_of_the_curve_are_thin_and_have_unit_variance():
    target = make_target("curve", 2)
    assert target.curve is not None
    x = target.mixture.sample(4000, generator())
    assert float(x.square().mean()) == pytest.approx(1, rel=0.1)
    off_curve = torch.cdist(x, target.curve).amin(1).square()
    assert float(off_curve.median()) == pytest.approx((DIMENSIONS - 1) * THICKNESS**2, rel=0.3)


def test_each_seed_draws_another_instance():
    for name in ("cond-100", "curve"):
        means = [make_target(name, seed).mixture.means for seed in (0, 0, 1)]
        assert torch.equal(means[0], means[1])
        assert not torch.allclose(means[0], means[2])


def test_the_exact_field_has_no_error(grader):
    metrics = grader.grade(grader.target.mixture.velocity)
    assert metrics["excess"] == metrics["paired"] == 0
    assert 0 < metrics["sliced"] < 0.05  # two finite samples of one distribution


def test_a_constant_error_is_the_excess_and_moves_the_samples(grader):
    exact = grader.target.mixture.velocity
    metrics = grader.grade(lambda x, t: exact(x, t) + 0.1)
    assert metrics["excess"] == pytest.approx(DIMENSIONS * 0.1**2, rel=EXACT)
    assert metrics["paired"] > 1e-3


def test_samples_of_another_distribution_have_a_large_distance(grader):
    own = grader.grade(grader.target.mixture.velocity)["sliced"]
    still = grader.grade(lambda x, t: torch.zeros_like(x))
    assert still["sliced"] > 20 * own
    moved = (grader.noise - grader.exact).square().sum(1).mean()
    assert still["paired"] == pytest.approx(float(moved), rel=EXACT)


def test_every_mode_trains_another_field_and_lowers_the_excess(grader):
    mixture = grader.target.mixture
    cases = [("adamw", 8e-3, mode) for mode in MODES] + [("muon", 3.2e-2, "base")]
    fields = [train_field(mixture, name, lr, 0, 12, MODES[mode]) for name, lr, mode in cases]
    found = [grader.grade(in_float32(field))["excess"] for field in fields if field]
    nothing = grader.grade(lambda x, t: torch.zeros_like(x))["excess"]
    assert len(set(found)) == len(cases)
    assert max(found) < 0.9 * nothing


def test_training_is_a_function_of_the_seed():
    mixture = make_target("cond-100", 0).mixture
    fields = [train_field(mixture, "adamw", 4e-3, seed, 12, MODES["fast"]) for seed in (0, 0, 1)]
    first, again, other = (field.layers[0].weight for field in fields if field)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_a_diverged_run_has_no_metrics():
    assert train_and_grade(RUN._replace(optimizer="sgd", lr=1e6, steps=20)) is None


def test_an_error_says_which_argument_is_wrong():
    for name in ("cond-", "cond-0.5", "cond-nan", "cond-inf", "ring"):
        with pytest.raises(ValueError, match="expected curve or cond-C"):
            make_target(name, 0)
    with pytest.raises(ValueError, match="seed=-1"):
        make_target("curve", -1)
    mixture, _ = small_mixture()
    with pytest.raises(ValueError, match=r"every time must be in \[0, 1\]"):
        mixture.velocity(normal(2, 3), torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="variances must be positive; weights must not"):
        Mixture(2 * mixture.weights, mixture.means, mixture.axes, -mixture.variances)
    with pytest.raises(ValueError, match=r"weights is \(2,\), but must be \(3,\)"):
        Mixture(mixture.weights[:2], mixture.means, mixture.axes, mixture.variances)
    with pytest.raises(ValueError, match="steps=0"):
        train_field(mixture, "adamw", 1e-3, 0, 0, {})
    with pytest.raises(ValueError, match="n_steps=0"):
        time_grid(0)


def power_law(excess, scale, power):
    """Return the metrics of runs whose paired error is scale * excess^power."""
    return [{"excess": e, "paired": scale * e**power} for e in excess]


def test_a_matched_difference_is_the_factor_between_two_laws():
    """Runs outside the range of the base follow another law, and are not compared."""
    factors = (0.5, 0.8, 1.1)
    base = [power_law((8, 4, 1), scale, 1.5) for scale in (1, 2, 3)]
    own = [
        [*power_law((3, 1.5), factor * scale, 1.5), {"excess": 0.9, "paired": 1e9}, None]
        for factor, scale in zip(factors, (1, 2, 3), strict=True)
    ]
    found = matched(own, base, "paired")
    assert found.mean == pytest.approx(sum(map(math.log, factors)) / 3)
    assert found.n == 3
    assert matched([[own[0][2]]], base[:1], "paired").n == 0


def test_a_ratio_leaves_out_pairs_with_a_diverged_run():
    base = power_law((1, 2, 3, 4), 1, 1)
    own = [*power_law((1, 2, 3), 2, 1), None]
    found = log_ratio(own, base, "paired")
    assert (found.mean, found.n) == (pytest.approx(math.log(2)), 3)


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch):
    path = tmp_path / "flow.json"
    monkeypatch.setattr(runs, "train_and_grade", lambda run: {"excess": 1.5})
    assert FlowResults(path, {"steps": (1, 2)}).of(RUN) == {"excess": 1.5}
    monkeypatch.setattr(runs, "train_and_grade", pytest.fail)
    assert FlowResults(path, {"steps": (1, 2)}).of(RUN) == {"excess": 1.5}
    with pytest.raises(ValueError, match="another protocol; use another --out"):
        FlowResults(path, {"steps": (1, 3)})


def test_the_command_refuses_an_unknown_target(tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.main(["--out", str(tmp_path / "flow.json"), "--targets", "ring"])
    assert "expected curve or cond-C" in capsys.readouterr().err


def test_the_study_tunes_on_the_tuning_seed_and_reports_the_others(tmp_path, monkeypatch, capsys):
    """Fake runs have their best rate at 1e-3 with DoPr and at 4e-3 without; DoPr halves errors."""

    def fake(run):
        has_dopr = run.mode != "base"
        distance = math.log2(run.lr / (1e-3 if has_dopr else 4e-3))
        excess = (1 + distance**2) * 100 / run.steps
        return {"excess": excess, "paired": excess * (0.5 if has_dopr else 1), "sliced": excess}

    monkeypatch.setattr(runs, "train_and_grade", fake)
    path = tmp_path / "flow.json"
    study.main(["--out", str(path), "--targets", "cond-1"])
    rows = [Run(*key) for key, _ in json.loads(path.read_text())["runs"]]
    assert {run.seed for run in rows} == {study.TUNING_SEED, *study.SEEDS}
    reported = {(run.mode, run.lr) for run in rows if run.seed in study.SEEDS}
    assert reported == {("base", 4e-3), ("base", 1e-3), ("fast", 1e-3), ("exact", 1e-3)}
    lines = capsys.readouterr().out.splitlines()
    (fast,) = (line for line in lines if "| cond-1 | adamw | fast | 1.000" in line)
    assert "| 0.500 [0.500, 0.500] (5) | 1.000 [1.000, 1.000] (5) |" in fast


def test_the_parts_by_axes_add_up_to_the_paired_error(grader):
    exact = grader.target.mixture.velocity

    def field(x, t):
        return exact(x, t) + 0.1 * x.sin()

    whole, parts = grader.grade(field), split_by_axes(grader, field)
    assert parts["thin"] + parts["wide"] == pytest.approx(whole["paired"], rel=EXACT)
    assert parts["excess"] == pytest.approx(whole["excess"], rel=EXACT)


def test_the_whitened_error_of_a_standard_deviation_along_every_axis_is_one(grader):
    """The field is zero, so its samples stay at 0, one standard deviation from the exact ones."""
    mixture = grader.target.mixture
    beside = copy.copy(grader)
    beside.noise = torch.zeros_like(grader.noise)
    beside.exact = (mixture.axes[0] * mixture.variances[0].sqrt()).sum(1).expand_as(grader.exact)
    parts = split_by_axes(beside, lambda x, t: torch.zeros_like(x))
    assert parts["whitened"] == pytest.approx(1, rel=EXACT)
    half = DIMENSIONS // 2
    assert parts["thin"] == pytest.approx(float(mixture.variances[0, :half].sum()), rel=EXACT)


def test_the_figure_joins_the_geometric_means_of_each_length():
    lengths = [power_law((4, 2), 1, 1), [*power_law((1,), 1, 1), None]]
    xs, ys = curve_of(lengths)
    assert xs == pytest.approx([2, 2])
    assert ys == pytest.approx([2, 2])


def test_a_run_of_the_results_can_be_repeated():
    """Another machine may round differently, which may change all digits but the first two."""
    found = FlowResults(RESULTS, study.PROTOCOL).found
    (run,) = (run for run in found if run[:3] == ("cond-100", "adamw", "base") and run[4:] == FIRST)
    assert train_and_grade(run) == pytest.approx(found[run], rel=0.05)
