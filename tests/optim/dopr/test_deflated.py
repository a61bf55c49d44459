"""Training with deflated inverses: U is carried over and saved; errors do not change it."""

import io

import pytest
import torch
from torch import nn

import optim.dopr.refresh
from optim import ActivationPreconditioner
from optim.kernels import damped_root
from optim.kernels.deflation import DEFLATION_RANK, NARROWEST, first_deflation_basis
from tests.optim.dopr.test_refresh import host_reads, stack
from tests.optim.models import oracle, randn, relative_error
from tests.optim.runs import LAZY, assert_same, train

D = NARROWEST


def made(n_layers=1, **settings):
    """Make a DoPr-SGD run with inputs of width D, 2 D in two blocks, and too narrow to deflate."""
    torch.manual_seed(0)
    layers = [nn.Linear(12, 2 * D), nn.Linear(2 * D, D)]
    model = nn.Sequential(*layers, *(nn.Linear(D, D) for _ in range(n_layers)), nn.Linear(D, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    settings = {"gamma": 0.1, "inverse": "newton_schulz", "block_diagonal": D} | settings
    return model, optimizer, ActivationPreconditioner(model, **settings).attach(optimizer)


def resumed(parts, **settings):
    """Save a run to a file and load it into new objects."""
    file, again = io.BytesIO(), made(**settings)
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    for part, state in zip(again, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    return again


def deflation_basis(parts):
    return [layer.deflation_basis for layer in parts[2].layers]


def first_of(parts):
    return [first_deflation_basis(layer.sigma, 1) for layer in parts[2].layers]


def same(some, others):
    return [a is b if a is None else torch.equal(a, b) for a, b in zip(some, others, strict=True)]


def test_wide_layers_have_directions_which_every_refresh_moves():
    parts = made()
    shapes = [None if U is None else tuple(U.shape) for U in deflation_basis(parts)]
    assert shapes == [None, (2, D, DEFLATION_RANK), *[(1, D, DEFLATION_RANK)] * 2]
    before = deflation_basis(parts)
    for step in range(2):
        train(parts, [step])
        assert same(deflation_basis(parts), before) == [True, False, False, False]
        before = deflation_basis(parts)
    assert parts[2].report()[1]["bytes"] == 4 * 2 * D * (3 * D + DEFLATION_RANK)


@pytest.mark.parametrize("setting", [{"inverse": "cholesky"}, {"exponent": 2}], ids=str)
def test_other_inverses_have_none(setting):
    parts = made(**setting)
    train(parts, range(1))
    assert deflation_basis(parts) == [None] * 4
    assert "deflation_basis" not in parts[2].state_dict()["1"]


@pytest.mark.parametrize(("gamma", "tolerance"), [(0.1, 1e-4), (0.01, 4e-4)])
def test_m_is_near_a_dense_fp64_solve(gamma, tolerance):
    z, layer = randn(300, D, seed=1) * torch.logspace(0, -2, D) + 1, nn.Linear(D, 7)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    preconditioner = ActivationPreconditioner(layer, gamma=gamma, inverse="newton_schulz")
    preconditioner.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        layer(z).square().sum().backward()
        G = layer.weight.grad.clone()
        optimizer.step()
        sigma = preconditioner.layers[0].sigma[0].double()
        assert relative_error(layer.weight.grad, oracle(G, sigma, gamma)) < tolerance
    assert preconditioner.report()[0]["fallbacks"] == 0


@pytest.mark.parametrize("settings", [{}, LAZY], ids=["exact", "lazy"])
def test_a_resumed_run_is_bit_equal(settings):
    whole, parts = made(**settings), made(**settings)
    train(whole, range(7))
    train(parts, range(5))
    parts = resumed(parts, **settings)
    train(parts, range(5, 7))
    assert_same(parts, whole)
    assert all(same(deflation_basis(parts), deflation_basis(whole)))


def test_a_state_of_another_inverse_is_taken_and_the_directions_are_found_again():
    parts = made(inverse="cholesky")
    train(parts, range(2))
    again = resumed(parts)
    assert all(same(deflation_basis(again), first_of(again)))
    train(again, [2])
    assert [row["fallbacks"] for row in again[2].report()] == [0] * 4
    assert deflation_basis(resumed(again, inverse="cholesky")) == [None] * 4


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(1, D, 3), r"2: deflation_basis is \(1, 128, 3\), but must be \(1, 128, 16\)"),
        (torch.full((1, D, DEFLATION_RANK), torch.nan), "2: deflation_basis is not finite"),
    ],
)
def test_directions_that_do_not_fit_are_refused(bad, message):
    parts = made()
    train(parts, range(1))
    state = parts[2].state_dict()
    state["2"] = state["2"] | {"deflation_basis": bad}
    with pytest.raises(ValueError, match=message):
        parts[2].load_state_dict(state)


def test_a_p_of_another_gamma_is_made_from_the_directions_of_the_state():
    parts, used = made(refresh_every=10), made(gamma=0.5, refresh_every=10)
    train(parts, range(2))
    train(used, range(3, 5))
    fresh = resumed(parts, gamma=0.5, refresh_every=10)
    used[2].load_state_dict(parts[2].state_dict())
    assert all(same(deflation_basis(used), deflation_basis(fresh)))
    assert same(deflation_basis(fresh), deflation_basis(parts)) == [True, False, False, False]


def test_chunks_and_pauses_leave_the_same_directions(monkeypatch):
    whole, parts = made(3), made(3)
    train(whole, range(3))
    monkeypatch.setattr(optim.dopr.refresh, "CHUNK_BYTES", 2 * 4 * D * D)
    for step in range(3):
        with parts[2].paused():
            parts[0](randn(9, 12, seed=90 + step)).sum().backward()
        parts[1].zero_grad()
        train(parts, [step])
    for a, b in zip(deflation_basis(parts)[1:], deflation_basis(whole)[1:], strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-3, atol=1e-4
        )  # batched sums run in a different order


def test_an_error_leaves_the_directions_as_they_were(monkeypatch):
    parts = made()
    train(parts, range(2))
    before = deflation_basis(parts)
    copies = [None if U is None else U.clone() for U in before]
    monkeypatch.setattr(damped_root, "PROBE_TOLERANCE", -1.0)
    with pytest.raises(FloatingPointError, match="no inverse after"):
        train(parts, [2])
    assert all(a is b for a, b in zip(deflation_basis(parts), before, strict=True))
    assert all(same(before, copies))


def test_the_host_reads_of_a_refresh_are_as_few_as_those_of_narrow_layers():
    counts = [
        host_reads(stack(n, d, inverse="newton_schulz")[1].step)
        for n, d in ((1, 8), (1, D), (4, D), (20, D))
    ]
    assert counts[0] == counts[1] == counts[2] == counts[3] <= 5
