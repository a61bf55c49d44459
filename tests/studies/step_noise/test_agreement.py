"""Test the agreement of steps against DoPr itself and against cases with a known one."""

import pytest
import torch
from torch import nn

from optim import ActivationPreconditioner
from studies.step_noise.agreement import (
    COLUMNS,
    agreement,
    agreements,
    of_layers,
    preconditioned,
    statistics,
    table,
)


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_step_behind_its_own_covariance_is_that_of_exact_mode():
    network = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)).double()
    x, y = drawn(2, 8, 5, seed=0), drawn(2, 8, 3, seed=1)

    def loss():
        return (network(x) - y).square().mean()

    found = statistics(network, ("0", "2"), loss)
    assert not any(statistic.requires_grad for pair in found.values() for statistic in pair)
    sgd = torch.optim.SGD(network.parameters(), lr=0.0)
    ActivationPreconditioner(network, gamma=0.5).attach(sgd)
    loss().backward()
    sgd.step()  # leaves the preconditioned gradients
    for name, (G, sigma) in found.items():
        M = preconditioned(G[None], sigma[None], 0.5)[0]
        expected = network.get_submodule(name).weight.grad
        torch.testing.assert_close(M, expected, rtol=1e-6, atol=0)


def test_a_layer_that_is_used_twice_is_refused():
    layer = nn.Linear(5, 5).double()
    x = drawn(2, 5, seed=0)
    with pytest.raises(ValueError, match="layer 0 is used more than once"):
        statistics(nn.Sequential(layer), ("0",), lambda: layer(layer(x)).sum())
    assert not layer._forward_pre_hooks


def test_one_covariance_can_be_that_of_all_batches():
    G, z = drawn(3, 4, 6, seed=2), drawn(9, 6, seed=3)
    sigma = z.mT @ z / 9
    expected = preconditioned(G, sigma.expand(3, -1, -1), 0.5)
    torch.testing.assert_close(preconditioned(G, sigma[None], 0.5), expected)


def test_equal_steps_agree_wholly_and_independent_ones_not_at_all():
    step = drawn(4, 5, seed=4)
    assert agreement(step.expand(7, -1, -1)) == pytest.approx(1)
    independent = drawn(300, 4, 5, seed=5)
    assert abs(agreement(independent)) < 0.02
    assert agreement(independent + 1) == pytest.approx(0.5, abs=0.02)  # equal parts of the square


def test_behind_their_own_covariance_steps_towards_a_linear_map_are_equal():
    A = drawn(3, 6, seed=6)
    z = drawn(50, 20, 6, seed=7)  # 50 batches
    sigma = z.mT @ z / 20
    G = A @ sigma  # the errors of the outputs are A z
    own, mean = (preconditioned(G, each, 0) for each in (sigma, sigma.mean(0, keepdim=True)))
    own /= sigma.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]  # m
    assert agreement(own) == pytest.approx(1)
    assert agreement(mean) < 0.9
    _, behind_mean, behind_other, behind_own = agreements(G, sigma, 0.1)  # with damping
    assert behind_own > max(behind_mean, behind_other)


def test_the_table_has_a_row_for_each_layer_and_a_column_for_each_covariance():
    batches = []
    for seed in range(4):
        z = drawn(9, 6, seed=seed)
        batches.append({"a": (drawn(3, 6, seed=9), z.mT @ z), "b": (z[:3], torch.eye(6).double())})
    heading, _, a, b = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table(of_layers(batches, 0.1)).splitlines()
    )
    assert heading == ["layer", *COLUMNS]
    assert a[:2] == ["`a`", "1.000"]  # one G for all batches
    assert float(a[2]) == 1  # and one Σ
    assert float(a[3]) < 1
    assert b[0] == "`b`"
    assert len(set(b[1:])) == 1  # behind Σ = I every step is G
