"""Embeddings whose rows FSDP2 shards over processes: each row has its own P."""

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from optim import ActivationPreconditioner
from tests.optim.distributed import full_tensor, in_process_group
from tests.optim.models import randn

pytestmark = pytest.mark.xdist_group("gang")  # share one set of worker processes

TOLERANCE = 1e-5  # fp32 sums in a different order
ROWS = 10  # with 4 processes, the last has one row and the others three


def train(how: str, n_steps: int = 3):
    """Train on the same ids, split over the processes; return the weights."""
    model = nn.Sequential(nn.Embedding(ROWS, 6), nn.Linear(6, 5))
    for i, parameter in enumerate(model.parameters()):
        parameter.data = randn(*parameter.shape, seed=i)
    forward = fully_shard(model) if how == "fsdp" else model
    forward = nn.parallel.DistributedDataParallel(model) if how == "ddp" else forward
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    ActivationPreconditioner(model, gamma=0.1, embeddings=True).attach(optimizer)
    size, rank = (
        (1, 0) if how == "alone" else (distributed.get_world_size(), distributed.get_rank())
    )
    for number in range(n_steps):
        ids = (
            ROWS * randn(24, seed=100 + number).sigmoid() ** 3
        ).long()  # some ids are frequent, some do not occur
        forward(ids.chunk(size)[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [full_tensor(parameter).numpy() for parameter in model.parameters()]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_every_row_is_divided_by_its_own_frequency(gang, how):
    expected = train("alone")
    for found in gang.run(4, in_process_group, train, how):
        for actual, reference in zip(found, expected, strict=True):
            np.testing.assert_allclose(actual, reference, atol=TOLERANCE)
