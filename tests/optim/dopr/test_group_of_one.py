"""DDP and FSDP2 in actual process (with NCCL on a GPU), where DoPr sends no messages."""

import numpy as np
import pytest

from tests.devices import DEVICES
from tests.optim import distributed as workers
from tests.optim.distributed import in_process_group

pytestmark = pytest.mark.xdist_group("gang")
FAST = {"refresh_every": 2, "sigma_beta": 0.9}


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), *DEVICES[1:]])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_group_of_one_trains_as_no_group(gang, how, device):
    for base in workers.BASES:
        weights, layers, _ = workers.train(base, "alone", 3, FAST, device)
        ((ours, our_layers, _),) = gang.run(
            1, in_process_group, workers.train, base, how, 3, FAST, device
        )
        for actual, reference in zip(ours, weights, strict=True):
            np.testing.assert_allclose(actual, reference, atol=1e-6, err_msg=base)
        for actual, reference in zip(our_layers, layers, strict=True):
            np.testing.assert_allclose(actual[0], reference[0], rtol=1e-5, atol=1e-6, err_msg=base)
