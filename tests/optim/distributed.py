"""What runs in each process of a test of the optimizers: a stranger's trainer, in a few lines."""

import hashlib
from datetime import timedelta

import pytest
import torch
from torch import Tensor, distributed, nn

from optim import ActivationPreconditioner
from optim.adamuon import AdaMuon
from optim.muon import Muon
from optim.process_group import local
from optim.signum import Signum
from tests.optim.models import mlp, randn, regression

WIDTHS = {"d_in": 12, "d": 7, "d_out": 5}  # of 4 processes, the last has no row of the last layer
BASES = {
    "adamw": lambda params, group: torch.optim.AdamW(params, lr=1e-2, eps=1e-4),
    "sgd": lambda params, group: torch.optim.SGD(params, lr=1e-1, momentum=0.9, foreach=True),
    "signum": lambda params, group: Signum(params, lr=1e-3),
    "muon": lambda params, group: Muon(matrices(params), **MATRIX, process_group=group),
    "adamuon": lambda params, group: AdaMuon(matrices(params), **MATRIX, process_group=group),
}
MATRIX = {"lr": 1e-2, "ns_dtype": "float32"}
N = 60  # tokens a step
LIMIT = timedelta(seconds=60)


def grouped(function, *args):
    """`function(*args)` with torch.distributed initialised, as torchrun's environment says."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=LIMIT)
    result = function(*args)
    distributed.barrier()
    distributed.destroy_process_group()
    return result


def message_of(function, *args):
    """What `function` raises, in words."""
    with pytest.raises((ValueError, RuntimeError, FloatingPointError)) as caught:
        function(*args)
    return f"{type(caught.value).__name__}: {caught.value}"


def matrices(params):
    return [param for param in params if param.dim() == 2]


def bounds(rank: int, size: int) -> tuple[int, int]:
    """Which of the N tokens of a step a process sees: ragged, and none for rank 1 of several."""
    ends = torch.tensor([7, 7, 30, N])[-size:] if size > 1 else torch.tensor([N])
    return (0 if rank == 0 else int(ends[rank - 1])), int(ends[rank])


def parts(base: str, how: str, device: str = "cpu", **settings):
    """Model, what is called, optimizer and preconditioner, as a stranger would make them."""
    model = mlp(**WIDTHS).to(device)
    forward = model
    if how == "ddp":
        forward = nn.parallel.DistributedDataParallel(model)
    elif how in ("fsdp", "hsdp"):
        forward = sharded(model, how, device)
    group = distributed.group.WORLD if how == "ddp" else None
    optimizer = BASES[base](list(model.parameters()), group)
    preconditioner = ActivationPreconditioner(model, gamma=0.1, **settings).attach(optimizer)
    return model, forward, optimizer, preconditioner


def sharded(model: nn.Module, how: str, device: str = "cpu") -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    size = distributed.get_world_size()
    shape, names = ((size,), ("s",)) if how == "fsdp" else ((size // 2, 2), ("r", "s"))
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(forward, optimizer, number: int) -> None:
    """One step on the N tokens of this number; every process on its own, in two micro-batches."""
    size = distributed.get_world_size() if distributed.is_initialized() else 1
    rank = distributed.get_rank() if size > 1 else 0
    first, last = bounds(rank, size)
    device = optimizer.param_groups[0]["params"][0].device
    x, target = (each.to(device) for each in regression(number, N))
    for rows in torch.arange(first, last).tensor_split(2):
        error = forward(x[rows]) - target[rows]
        (error.square().sum() * size / N).backward()  # DDP and FSDP2 take the mean over processes
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.5)
    optimizer.step()
    optimizer.zero_grad()


def whole(tensor) -> Tensor:
    whole = tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
    return whole.cpu()


def train(base: str, how: str, n_steps: int, settings: dict, device: str = "cpu"):
    """Weights, and Σ and P of every layer, after n_steps."""
    model, forward, optimizer, preconditioner = parts(base, how, device, **settings)
    for number in range(n_steps):
        step(forward, optimizer, number)
    return (
        [whole(param).numpy() for param in model.parameters()],
        [(layer.sigma.cpu().numpy(), layer.P.cpu().numpy()) for layer in preconditioner.layers],
        [row["norm_ratio"] for row in preconditioner.report()],
    )


COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "all_to_all_single")


def counted(base: str, how: str, n_steps: int, settings: dict) -> list[dict[str, int]]:
    """How many collectives each step asks for, not counting those inside DDP and FSDP2."""
    _, forward, optimizer, _ = parts(base, how, **settings)
    counts: list[dict[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(distributed, name, counting(name, getattr(distributed, name), counts))
        for number in range(n_steps):
            counts.append(dict.fromkeys(COLLECTIVES, 0))
            step(forward, optimizer, number)
    return counts


def counting(name: str, function, counts: list[dict[str, int]]):
    def call(*args, **kwargs):
        counts[-1][name] += 1
        return function(*args, **kwargs)

    return call


def fingerprint(base: str, how: str, n_steps: int, settings: dict) -> tuple[str, str]:
    """Hashes of all that must be the same: weights here, statistics."""
    model, forward, optimizer, preconditioner = parts(base, how, **settings)
    for number in range(n_steps):
        step(forward, optimizer, number)
    here = [local(param.detach()) for param in model.parameters()]
    known = [each for layer in preconditioner.layers for each in (layer.sigma, layer.P)]
    return digest(here), digest(known)


def digest(tensors: list[Tensor]) -> str:
    return hashlib.sha256(b"".join(each.numpy().tobytes() for each in tensors)).hexdigest()


def deflated(how: str):
    """U and P of one layer, wide enough to be deflated, after two steps."""
    model = nn.Sequential(nn.Linear(128, 4))
    forward = nn.parallel.DistributedDataParallel(model) if how == "ddp" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    preconditioner = ActivationPreconditioner(model, gamma=0.1, inverse="newton_schulz")
    preconditioner.attach(optimizer)
    size, rank = (distributed.get_world_size(), distributed.get_rank()) if how == "ddp" else (1, 0)
    for number in range(2):
        x = randn(N, 128, seed=number) * torch.logspace(0.5, -1, 128)
        first, last = bounds(rank, size)
        (forward(x[first:last]).square().sum() * size / N).backward()
        optimizer.step()
        optimizer.zero_grad()
    (layer,) = preconditioner.layers
    return layer.deflation_basis.numpy(), layer.P.numpy()
