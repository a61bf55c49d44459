"""One process that uses torch.distributed trains like one that does not.

This is what can be tested of NCCL with one GPU: placement, the communication of DDP and FSDP2, and
decisions. In a group of one process, DoPr neither sums Σ nor sends P.
"""

import pytest
import torch

from model import GPT, GPTConfig
from optim import ActivationPreconditioner
from optim.build import build_optimizers
from tests.devices import DEVICES
from trainer import parallel as parallel_module
from trainer.parallel import Parallel
from trainer.sharding import full_tensor, make_mesh

pytestmark = pytest.mark.xdist_group("gang")
SHAPE = {"n_layer": 2, "block_size": 16, "n_embd": 32, "n_head": 2, "vocab_size": 64}
NUMBERS = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "momentum": 0.95}


class Forced(Parallel):
    """A Parallel with one process that behaves as if there were two, so that it communicates."""

    def __enter__(self):
        self.size, start = 2, torch.distributed.init_process_group

        def mesh_of_one(kind, size, *more):
            return make_mesh(kind, 1, *more)

        def start_one(*args, **kwargs):
            start(*args, **kwargs | {"world_size": 1})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parallel_module, "make_mesh", mesh_of_one)
            patch.setattr(torch.distributed, "init_process_group", start_one)
            return super().__enter__()


def weights_after(parallel: Parallel, optimizer: str) -> list[torch.Tensor]:
    """Return the weights of a tiny GPT after three steps of two micro-batches with DoPr."""
    with parallel:
        torch.manual_seed(0)
        model = GPT(GPTConfig(bias=False, **SHAPE))
        parallel.place(model)
        settings = {"optimizer": optimizer, "lr": 1e-2, "ns_dtype": "float32", **NUMBERS}
        optimizers = build_optimizers(model, **settings, process_group=parallel.group())
        ActivationPreconditioner(model, gamma=0.1).attach(
            *optimizers, process_group=parallel.group()
        )
        forward = parallel.wrap(model, is_compiled=False)
        ids = torch.randint(64, (3, 2, 4, 17), generator=torch.Generator().manual_seed(1))
        for step in ids:
            for i, rows in enumerate(step):
                parallel.sync_gradients(forward, is_last=i == 1)
                x, y = rows[:, :-1], rows[:, 1:].contiguous()
                (forward(parallel.to_device(x), parallel.to_device(y))[1] / 2).backward()
            for each in optimizers:
                each.step()
            model.zero_grad()
        assert (parallel.gather("here")[0], parallel.all_reduce_flag(3)) == ("here", 3)
        return [full_tensor(p.detach()).cpu() for p in model.parameters()]


def distance(device: str, parallel: str, optimizer: str) -> float:
    """Return the largest difference of a weight with and without torch.distributed."""
    plain = weights_after(Parallel(torch.device(device)), optimizer)
    forced = weights_after(Forced(torch.device(device), mode=parallel, timeout_s=60), optimizer)
    return max((a - b).abs().max().item() for a, b in zip(plain, forced, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_process_trains_as_without_torch_distributed(gang, parallel, optimizer, device):
    (found,) = gang.run(1, distance, device, parallel, optimizer)
    assert found < 1e-5  # fp32; the weights are near 0.02 and three steps move them by as much
