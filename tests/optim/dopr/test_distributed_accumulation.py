"""The result depends neither on the micro-batches nor on when gradients are averaged."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import distributed, nn

from tests.optim import distributed as workers
from tests.optim.distributed import full_tensor, in_process_group
from tests.optim.models import regression

pytestmark = pytest.mark.xdist_group("gang")  # share one set of worker processes

TOLERANCE = 1e-6  # fp32 sums in a different order; three steps move the weights by 1e-2


def train(how: str, n_micro: int, *, is_lazy: bool):
    """Return the weights after three steps. `is_lazy` averages only after the last micro-batch."""
    model, forward, optimizer, _ = workers.parts("adamw", how)
    size, rank = distributed.get_world_size(), distributed.get_rank()
    for number in range(3):
        x, target = (each.chunk(size)[rank] for each in regression(number, 64))
        for i, rows in enumerate(torch.arange(len(x)).chunk(n_micro), start=1):
            waits = is_lazy and i < n_micro
            if how == "fsdp":
                forward.set_requires_gradient_sync(not waits)
            with forward.no_sync() if waits and how == "ddp" else nullcontext():
                ((forward(x[rows]) - target[rows]).square().mean() / n_micro).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return [full_tensor(parameter).numpy() for parameter in model.parameters()]


def each_way(how: str):
    return [
        train(how, n, is_lazy=lazy) for n, lazy in ((1, False), (8, False), (2, True), (8, True))
    ]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_eight_micro_batches_are_two_are_one_and_no_sync(gang, how):
    for one_batch, *variants in gang.run(2, in_process_group, each_way, how):
        for variant in variants:
            for actual, expected in zip(variant, one_batch, strict=True):
                np.testing.assert_allclose(actual, expected, atol=TOLERANCE)
