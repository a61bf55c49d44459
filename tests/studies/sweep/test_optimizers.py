"""Optimizers of models that train.py does not train."""

import torch
from torch import nn

from studies.sweep.optimizers import build, finish, step


def test_at_the_end_the_weights_are_those_to_evaluate():
    """Of a schedule-free optimizer these are x, where the gradients are at y = 0.9 x + 0.1 z."""
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
