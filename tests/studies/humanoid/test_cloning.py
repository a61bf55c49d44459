"""Test that clones learn with every optimizer and depend only on the seed and the settings."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from optim.build import OPTIMIZERS
from studies.humanoid import cloning
from studies.humanoid.cloning import CLIP_INPUTS, OTHER_BATCHES, Scaling, train_clone
from studies.sweep.optimizers import step

RATES = {"sgd": 0.03, "adamw": 0.003, "signum": 0.005, "muon": 0.02, "adamuon": 0.02}
CONSTANT = 3  # a dimension of the observations that does not vary
FAST = {"refresh_every": 4, "sigma_beta": 0.95}


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(0)
    x = random.standard_normal((400, 12)) * np.geomspace(1, 100, 12) + 5
    x[:, CONSTANT] = 1.5
    actions = 0.1 * np.tanh((x - 5) / np.geomspace(1, 100, 12)) @ random.standard_normal((12, 3))
    return x.astype(np.float32), actions.astype(np.float32)


def clone(data, optimizer="adamw", *, seed=0, steps=20, lr=None, dopr=None, **others):
    found = train_clone(
        *data,
        width=16,
        optimizer=optimizer,
        lr=lr or RATES[optimizer],
        seed=seed,
        steps=steps,
        dopr=dopr or {},
        **others,
    )
    return found and found(data[0])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dopr", [{}, {"refresh_every": 1}], ids=["base", "dopr"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_reduces_the_error(data, optimizer, dopr):
    error = np.square(clone(data, optimizer, steps=100, dopr=dopr) - data[1]).mean()
    assert error < 0.5 * data[1].var()


def test_a_clone_depends_only_on_the_seed_and_keeps_the_global_random_state(data):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = clone(data, dopr=FAST)
    assert torch.get_rng_state().equal(before)
    np.testing.assert_array_equal(clone(data, dopr=FAST), first)
    assert np.any(clone(data, seed=1, dopr=FAST) != first)


def test_a_class_of_another_package_trains_the_same_clone_twice(data):
    free = {"optimizer": "schedulefreeadamw", "lr": 0.02, "schedule": "constant", "steps": 100}
    found = [clone(data, **free) for _ in range(2)]
    np.testing.assert_array_equal(*found)
    assert np.square(found[0] - data[1]).mean() < 0.5 * data[1].var()
    assert np.any(clone(data, **free | {"schedule": "cosine"}) != found[0])
    kron = [clone(data, "kron", lr=0.01, steps=5) for _ in range(2)]  # draws random numbers
    np.testing.assert_array_equal(*kron)


def test_dopr_and_each_of_its_settings_change_the_clone(data):
    settings = [{}, FAST, FAST | {"fresh_mean": True}, FAST | {"include": ["0"]}]
    found = [clone(data, dopr=each) for each in settings]
    for i, own in enumerate(found):
        assert all(np.any(own != other) for other in found[:i])


def test_the_covariance_is_that_of_the_batch_or_of_another_one(data):
    """The first step of SGD must be that of a dense fp64 solve, for the layer of the outputs."""
    gamma, lr = 0.1, 1.0
    settings = {"width": 16, "optimizer": "sgd", "lr": lr, "seed": 3, "steps": 1, "batch_size": 7}
    dopr = {"refresh_every": 1, "gamma": gamma}
    start = cloning.make_network(11, 3, 16, seed=3)
    x, y = Scaling.of(*data).inputs(data[0]), Scaling.of(*data).targets(data[1])
    batches = [torch.randint(400, (7,), generator=seeded(3 + n)) for n in (0, OTHER_BATCHES)]
    G = torch.autograd.grad((start(x[batches[0]]) - y[batches[0]]).square().mean(), start[6].weight)
    for own_sigma, batch in zip((True, False), batches, strict=True):
        found = train_clone(*data, dopr=dopr, own_sigma=own_sigma, **settings).network[6].weight
        z = start[:6](x[batch]).double()
        sigma = z.mT @ z / len(z)
        m = sigma.trace() / 16
        M = m * torch.linalg.solve(sigma + gamma * m * torch.eye(16), G[0].double(), left=False)
        expected = start[6].weight.double() - lr * M
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
        assert (found - start[6].weight).abs().max() > 0.01


def test_dopr_does_not_warn_of_the_gradients_that_only_give_the_covariance(data, caplog):
    clone(data, dopr={"refresh_every": 1}, own_sigma=False)
    assert not caplog.records


def test_without_dopr_the_batch_of_the_covariance_does_not_matter(data):
    np.testing.assert_array_equal(clone(data, own_sigma=False), clone(data))


def test_a_clone_whose_loss_is_not_finite_is_none(data):
    assert clone(data, "sgd", lr=1e6) is None


def test_constant_observations_are_dropped_and_the_others_standardized(data):
    scaling = Scaling.of(*data)
    changed = data[0].copy()
    changed[:, CONSTANT] = 100.0
    assert scaling.inputs(changed).equal(scaling.inputs(data[0]))
    assert scaling.inputs(1e6 * data[0]).abs().max() == CLIP_INPUTS
    inputs = scaling.inputs(data[0])
    assert inputs.shape == (400, 11)
    torch.testing.assert_close(inputs.std(0, correction=0), torch.ones(11))
    torch.testing.assert_close(inputs.mean(0), torch.zeros(11), atol=1e-5, rtol=0)
    assert scaling.action_scale == pytest.approx(data[1].std())


@pytest.mark.parametrize("whitening", [0.5, 0.9])
def test_whitening_mixes_the_covariance_with_the_identity(data, whitening):
    plain, found = Scaling.of(*data), Scaling.of(*data, whitening)
    x = plain.inputs(data[0]).double().numpy()
    C = x.T @ x / len(x)
    mixed = whitening * C * len(C) / np.trace(C) + (1 - whitening) * np.eye(len(C))
    expected = x @ np.linalg.inv(sqrtm(mixed).real)
    np.testing.assert_allclose(found.inputs(data[0]).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_without_whitening_the_clone_does_not_change(data):
    np.testing.assert_array_equal(clone(data, whitening=0.0), clone(data))
    assert np.any(clone(data, whitening=0.5) != clone(data))


def test_the_average_of_the_weights_is_graded(data, monkeypatch):
    steps = []  # of the weights after each step, in float64

    def recorded(optimizers, scale):
        step(optimizers, scale)
        weights = [p for group in optimizers[0].param_groups for p in group["params"]]
        steps.append([p.detach().double().clone() for p in weights])

    monkeypatch.setattr(cloning, "step", recorded)
    options = {"width": 16, "optimizer": "adamw", "lr": 0.003, "seed": 0, "steps": 20, "dopr": {}}
    found = train_clone(*data, **options, ema_decay=0.9)
    expected = steps[0]
    for weights in steps[1:]:
        expected = [0.9 * a + 0.1 * w for a, w in zip(expected, weights, strict=True)]
    sums = sorted(float(each.sum()) for each in expected)
    own = sorted(float(p.detach().double().sum()) for p in found.network.parameters())
    assert own == pytest.approx(sums, rel=1e-4, abs=1e-5)
    assert np.any(found(data[0]) != clone(data, ema_decay=0.0))


def test_the_first_layer_can_have_a_learning_rate_of_its_own(data):
    options = {"optimizer": "muon", "dopr": FAST}  # the biases have another optimizer
    same = clone(data, **options, first_layer_lr=RATES["muon"])
    np.testing.assert_array_equal(same, clone(data, **options))
    assert np.any(clone(data, **options, first_layer_lr=2 * RATES["muon"]) != same)
    options = {"width": 16, "optimizer": "adamw", "lr": 0.003, "seed": 0, "steps": 20, "dopr": {}}
    frozen = train_clone(*data, **options, first_layer_lr=0.0).network
    at_first = cloning.make_network(11, 3, 16, seed=0)
    is_kept = [
        torch.equal(a, b) for a, b in zip(frozen.parameters(), at_first.parameters(), strict=True)
    ]
    assert is_kept == [True] + 7 * [False]


def test_further_data_change_the_clone_from_their_step_on(data):
    """Data that arrive at the last step change only the last batch; earlier data change more."""
    seen = []

    def more(found):
        seen.append(found(data[0]))
        return data[0], -data[1]

    plain = clone(data)
    np.testing.assert_array_equal(
        clone(data, data_at_step={20: more}), plain
    )  # after the last step
    assert not seen
    late, early = clone(data, data_at_step={19: more}), clone(data, data_at_step={1: more})
    assert 0 < np.abs(late - plain).max() < np.abs(early - plain).max()
    assert [np.abs(each - plain).max() > 0 for each in seen] == [True, True]
    assert np.abs(early).mean() < 0.7 * np.abs(plain).mean()  # opposite actions in every state
