"""DDP and FSDP2 in one process, on a GPU by NCCL; Σ and P need no messages there."""

import numpy as np
import pytest

from tests.devices import DEVICES
from tests.optim import distributed as workers
from tests.optim.distributed import grouped

pytestmark = pytest.mark.xdist_group("gang")
FAST = {"refresh_every": 2, "sigma_beta": 0.9}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_group_of_one_trains_as_no_group(gang, how, device):
    for base in workers.BASES:
        weights, layers, _ = workers.train(base, "alone", 3, FAST, device)
        ((ours, our_layers, _),) = gang.run(1, grouped, workers.train, base, how, 3, FAST, device)
        for one, other in zip(ours, weights, strict=True):
            np.testing.assert_allclose(
                one, other, atol=1e-6, err_msg=base
            )  # fp32, sums as they are
        for one, other in zip(our_layers, layers, strict=True):
            np.testing.assert_allclose(one[0], other[0], rtol=1e-5, atol=1e-6, err_msg=base)
