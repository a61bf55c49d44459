"""Training with backend="triton" equals backend="torch", on a GPU or in Triton's interpreter."""

import pytest
import torch

from optim import ActivationPreconditioner
from optim.adamuon import AdaMuon
from optim.kernels import damped_root
from optim.kernels.damped_root import damped_inverse_root
from optim.muon import Muon
from tests.kernels.spectra import relative_error, spd
from tests.kernels.triton_device import (
    DEVICE,
    INTERPRETED,
    randn,
    triton_apply,
    triton_gram,
    triton_newton_schulz,
)
from tests.optim.models import mlp

OPERATIONS = [
    (triton_gram, "gram_"),
    (triton_apply, "apply"),
    (triton_newton_schulz, "inverse_root"),
    (triton_newton_schulz, "orthogonalize"),
]
FAST = {"refresh_every": 2, "token_stride": 3, "sigma_beta": 0.9}
BLOCKS = {"block_diagonal": 6}
NEWTON_SCHULZ = {"inverse": "newton_schulz"}


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of each Triton operation."""
    counts = {}

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    for module, name in OPERATIONS:
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return counts


def change(make_optimizer, **settings):
    """Return the change of an MLP's weights in three steps; `settings` enable preconditioning."""
    model = mlp().to(DEVICE)
    optimizer = make_optimizer([p for p in model.parameters() if p.dim() == 2])
    if settings:
        ActivationPreconditioner(model, gamma=0.1, **settings).attach(optimizer)
    before = [p.clone() for p in model.parameters()]
    for step in range(3):
        x = randn(4, 7, 12, seed=step)
        (model(x) - x[..., :5]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.parameters()
    return torch.cat([(b - a).flatten() for a, b in zip(before, after, strict=True)])


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


@pytest.mark.parametrize(
    ("settings", "inverses", "tolerance"),
    [  # 1e-4: tf32x3 rounds by 2^-21, times a condition number of at most 12 (1 + 1/γ) = 132.
        # 1e-3: WANTED_ERROR of Newton-Schulz in kernels/damped_root.py
        ({}, 0, 1e-4),
        pytest.param(FAST | BLOCKS, 0, 1e-4, marks=pytest.mark.slow),
        pytest.param(NEWTON_SCHULZ | BLOCKS, 3, 1e-3, marks=pytest.mark.slow),
        (NEWTON_SCHULZ | FAST, 2, 1e-3),
    ],
)
def test_dopr_takes_the_same_steps(settings, inverses, tolerance, calls):
    expected = change(sgd, backend="torch", **settings)
    assert not calls
    got = change(sgd, backend="triton", **settings)
    assert relative_error(got, expected) < tolerance
    assert calls["gram_"] == calls["apply"] == 2 * 3  # two layers, of two shapes, three steps
    assert calls.get("inverse_root", 0) == 2 * inverses


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [  # bf16 resolves 2^-8, five iterations deep
        (Muon, "float32", 1e-4),
        (AdaMuon, "bfloat16", 0.1),
        pytest.param(Muon, "bfloat16", 0.1, marks=pytest.mark.slow),
        pytest.param(AdaMuon, "float32", 1e-4, marks=pytest.mark.slow),
    ],
)
def test_muon_takes_the_same_steps(kind, dtype, tolerance, calls):
    def optimizer(backend):
        return lambda params: kind(params, lr=0.1, ns_dtype=dtype, backend=backend)

    expected = change(optimizer("torch"))
    assert not calls
    got = change(optimizer("triton"))
    assert relative_error(got, expected) < tolerance
    assert calls == {"orthogonalize": 2 * 3}


def test_layers_of_equal_shape_are_preconditioned_in_one_launch(calls):
    model = torch.nn.Sequential(*(torch.nn.Linear(6, 6, bias=False) for _ in range(5))).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ActivationPreconditioner(model, gamma=0.1, backend="triton").attach(optimizer)
    model(randn(20, 6)).square().sum().backward()
    optimizer.step()
    assert calls == {"gram_": 5, "apply": 1}


@pytest.mark.parametrize(
    ("p", "gamma"),
    [  # uses bf16x3 for 0.1 and ieee for 1e-4
        (1, 0.1),
        (2, 1e-4),
        pytest.param(1, 1e-4, marks=pytest.mark.slow),
        pytest.param(2, 0.1, marks=pytest.mark.slow),
    ],
)
def test_the_bound_alone_makes_an_inverse_as_good_as_wanted(p, gamma, calls, monkeypatch):
    monkeypatch.setattr(damped_root, "_measured_condition", None)  # it would read the device
    A, _ = spd(16, 1e6, top=0.5)
    sigma = A[None].to(DEVICE)
    mean = sigma[0].trace() / 16
    settings = {"inverse": "newton_schulz", "condition_bound": 16 / gamma}
    X, _, failures = damped_inverse_root(sigma, gamma * mean[None], p, backend="triton", **settings)
    expected = damped_inverse_root(sigma.double(), gamma * mean[None], p, backend="torch").X
    assert relative_error(X, expected) < 1e-3
    assert (calls, failures.item()) == ({"inverse_root": 1}, 0)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # numpy, interpreted
def test_an_inverse_that_triton_misses_is_redone_by_cholesky(calls):
    sigma = torch.diag(torch.tensor([-0.5, 1.0, 1.0], device=DEVICE))[None]
    settings = {"inverse": "newton_schulz", "backend": "triton", "condition_bound": 1e4}
    X, damping, failures = damped_inverse_root(sigma, sigma.new_full((1,), 0.01), 1, **settings)
    assert calls == {"inverse_root": 1}
    assert failures.item() == 3  # Newton-Schulz, Cholesky, and Cholesky with damping 0.1
    torch.testing.assert_close(damping, sigma.new_ones(1))
    assert X.isfinite().all()


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU auto takes Triton")
def test_auto_is_torch_on_a_cpu_even_where_triton_is_interpreted(calls):
    change(sgd, backend="auto")
    change(lambda params: Muon(params, lr=0.1))
    assert not calls
