"""Faults raise an error, are counted as fallbacks, or have no effect."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optim import ActivationPreconditioner
from optim.kernels import damped_root
from tests.optim.models import backward, mlp, randn, regression
from tests.optim.runs import LAZY, assert_same, made, train


@pytest.mark.parametrize("settings", [{}, LAZY], ids=["exact", "lazy"])
def test_discard_leaves_everything_but_the_unused_activations(settings):
    parts, twin = made(**settings), made(**settings)
    train(parts, range(4))
    train(twin, range(4))
    backward(parts[0], 99, scale=float("nan"))
    parts[2].discard()
    parts[1].zero_grad()
    twin[2].discard()  # drops the sum over several steps, as it would be NaN
    assert_same(parts, twin)
    train(parts, range(4, 9))
    train(twin, range(4, 9))
    assert_same(parts, twin)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_without_gradients_before_any_forward_changes_nothing(set_to_none):
    parts, twin = made(), made()
    for parameter in parts[0].parameters():
        parameter.grad = None if set_to_none else torch.zeros_like(parameter)
    parts[1].step()
    assert_same(parts, twin)
    assert all(layer.n_refreshes == 0 for layer in parts[2].layers)
    train(parts, range(3))
    assert all(layer.n_refreshes == 3 for layer in parts[2].layers)


def test_a_layer_that_is_not_used_in_a_step_keeps_its_sigma_and_weight():
    model = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    for used in ((0, 1), (0,), (0, 1)):
        before = model[1].weight.clone(), preconditioner.layers[1].sigma
        optimizer.zero_grad()
        sum(model[i](randn(9, 4, seed=i)).square().sum() for i in used).backward()
        optimizer.step()
        assert torch.equal(model[1].weight, before[0]) == (1 not in used)
        assert (preconditioner.layers[1].sigma is before[1]) == (1 not in used)


@pytest.mark.parametrize("settings", [{}, LAZY], ids=["exact", "lazy"])
def test_a_forward_that_was_bypassed_is_an_error_that_names_the_layer(settings):
    model, optimizer, _ = made(**settings)
    F.linear(randn(9, 12, seed=1), model[0].weight).sum().backward()
    with pytest.raises(RuntimeError, match=r"0 has a gradient .* not seen.*exclude=\['0'\]"):
        optimizer.step()


def scaled_run(fused):
    """Train with a GradScaler, which overflows in the second of four steps."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(4):
        scaler.scale(model(regression(step)[0]).square().mean()).backward()
        if step == 1:
            model[0].weight.grad[0, 0] = torch.inf
        before = model[0].weight.grad.clone()
        scaler.step(optimizer)
        if step == 1:
            assert torch.equal(model[0].weight.grad, before) == fused  # unfused are unscaled
            preconditioner.discard()
        scaler.update()
        optimizer.zero_grad()
    return model, preconditioner


def test_a_fused_step_that_overflows_is_skipped_as_an_unfused_one():
    (model, fused), (twin, unfused) = scaled_run(True), scaled_run(False)
    assert [layer.step for layer in fused.layers] == [layer.step for layer in unfused.layers]
    assert [layer.n_refreshes for layer in fused.layers] == [3, 3]
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


# -- numbers that break an inverse


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30, 1e19, 3e18])
def test_activations_that_are_not_finite_are_counted_and_the_last_p_kept(bad, caplog):
    layer = nn.Linear(6, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    preconditioner = ActivationPreconditioner(layer, gamma=0.1).attach(optimizer)
    layer(randn(20, 6, seed=1)).sum().backward()
    optimizer.step()
    P = preconditioner.layers[0].P.clone()
    layer(randn(20, 6, seed=2) * bad).sum().backward()
    G = layer.weight.grad = randn(2, 6, seed=3)
    G = G.clone()
    with caplog.at_level(logging.WARNING, logger="dopr"):
        optimizer.step()
    assert "not finite" in caplog.text
    assert preconditioner.report()[0]["fallbacks"] == 1
    assert torch.equal(preconditioner.layers[0].P, P)
    torch.testing.assert_close(layer.weight.grad, G @ P[0])
    assert preconditioner.layers[0].capture.count == 0


def test_the_first_activations_must_be_finite():
    model, optimizer, _ = made()
    model(torch.full((3, 12), float("nan"))).sum().backward()
    with pytest.raises(FloatingPointError, match="first activations seen by 0"):
        optimizer.step()


@pytest.mark.parametrize("scale", [1e-17, 1e-8, 1e8, 1e17])
def test_the_scale_of_activations_does_not_matter(scale):
    Ms = []
    for factor in (1.0, scale):
        layer = nn.Linear(6, 2)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        ActivationPreconditioner(layer, gamma=0.1).attach(optimizer)
        y = layer(factor * randn(20, 6, seed=1))
        (y * randn(20, 2, seed=2)).sum().backward()
        optimizer.step()
        Ms.append(layer.weight.grad / factor)
    torch.testing.assert_close(*Ms, rtol=1e-4, atol=1e-5)  # squares of 1e-17 lose some bits in fp32


@pytest.mark.parametrize(
    ("inverse", "what"),
    [
        ("cholesky", "Cholesky failed"),
        ("newton_schulz", "Newton-Schulz failed, redone by Cholesky"),
    ],
)
def test_a_sigma_that_is_not_positive_definite_is_damped_more_counted_and_logged(
    inverse, what, caplog
):
    layer = nn.Linear(6, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    preconditioner = ActivationPreconditioner(layer, gamma=1e-3, inverse=inverse).attach(optimizer)
    layer(randn(20, 6, seed=1)).sum().backward()
    preconditioner.layers[0].capture.gram[0, 0, 0] = -0.5  # Σ gets an eigenvalue below -γ̄
    optimizer.step()
    (row,) = preconditioner.report()
    (layer_state,) = preconditioner.layers
    assert row["fallbacks"] == 1
    assert what in caplog.text
    assert "; damping is now" in caplog.text
    factor = layer_state.damping / (1e-3 * layer_state.sigma[0].trace() / 6)
    assert factor.log10() >= 1
    torch.testing.assert_close(factor.log10(), factor.log10().round())
    A = layer_state.sigma[0] + layer_state.damping * torch.eye(6)
    mean = layer_state.sigma[0].trace() / 6
    torch.testing.assert_close(A @ layer_state.P[0] / mean, torch.eye(6), rtol=0, atol=1e-4)


def test_a_covariance_that_has_no_inverse_at_all_is_an_error_and_changes_nothing(monkeypatch):
    parts, twin = made(), made()
    train(parts, range(2))
    train(twin, range(2))
    backward(parts[0], 2)
    monkeypatch.setattr(damped_root, "PROBE_TOLERANCE", -1.0)
    with pytest.raises(FloatingPointError, match=r"^0: .*no inverse after"):
        parts[1].step()
    monkeypatch.undo()
    parts[2].discard()
    parts[1].zero_grad()
    assert_same(parts, twin)


def test_dead_features_at_gamma_zero_give_finite_weights():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    preconditioner = ActivationPreconditioner(model, gamma=0.0).attach(optimizer)
    x = randn(8, 12, seed=1)
    x[:, 3] = 0
    model(x).square().sum().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert preconditioner.report()[0]["fallbacks"] == 1


# -- what is logged


def test_a_newton_schulz_that_cholesky_mends_says_so_and_no_damping(monkeypatch, caplog):
    _, _, preconditioner = parts = made(inverse="newton_schulz")
    monkeypatch.setattr(damped_root, "inverse_root", lambda A, *_, **__: A * torch.nan)
    with caplog.at_level(logging.WARNING, logger="dopr"):
        train(parts, range(1))
    assert "0: Newton-Schulz failed, redone by Cholesky" in caplog.text
    assert "damping" not in caplog.text
    assert [row["fallbacks"] for row in preconditioner.report()] == [1, 1]


def test_what_happens_every_step_is_logged_at_powers_of_two(caplog):
    layer = made()[2].layers[0]
    with caplog.at_level(logging.WARNING, logger="dopr"):
        for _ in range(9):
            layer.count_fallback("again")
    assert [record.args[-1] for record in caplog.records] == [1, 2, 4, 8]
    assert layer.n_fallbacks == 9


def test_a_model_that_is_one_layer_is_called_by_its_type():
    layer = nn.Linear(6, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    ActivationPreconditioner(layer, gamma=0.1).attach(optimizer)
    layer(torch.full((3, 6), torch.nan)).sum().backward()
    with pytest.raises(FloatingPointError, match="seen by Linear are not finite"):
        optimizer.step()
