"""Test the optimizers of models that train.py does not train."""

import pytest
import torch
from torch import nn

from studies.sweep.optimizers import build, default_settings, finish, step


def test_finish_puts_the_weights_for_evaluation_in_place():
    """A schedule-free optimizer has gradients at y = 0.9 x + 0.1 z and is evaluated at x."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    optimizers = build(model, "schedulefreeadamw", 0.1, {}, "betas=(0.9, 0.99)")
    for _ in range(5):
        model(torch.randn(8, 4)).square().mean().backward()
        step(optimizers, 1.0)
    weight = model[0].weight
    y, z = weight.detach().clone(), optimizers[0].state[weight]["z"]
    finish(optimizers)
    assert not torch.equal(weight, y)
    torch.testing.assert_close(0.9 * weight.detach() + 0.1 * z, y)


def test_a_rate_for_a_parameter_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no optimizer holds a parameter first"):
        build(nn.Linear(4, 3), "adamw", 0.1, {}, own_lr={"first": 0.2})


def test_default_settings_are_those_that_the_optimizer_reads_and_dopr_has():
    plain, with_dopr = (default_settings("muon", has_dopr) for has_dopr in (False, True))
    assert (plain["momentum"], plain["ns_dtype"]) == (0.95, "auto")
    assert "gamma" not in plain
    assert with_dopr.items() > plain.items()
    assert (with_dopr["gamma"], with_dopr["refresh_every"]) == (0.1, 1)
    assert "beta1" not in default_settings("signum", False)
    assert default_settings("lion", False) == {}
