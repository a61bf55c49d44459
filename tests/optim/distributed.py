"""Functions that the worker processes of distributed optimizer tests run: a minimal trainer."""

import hashlib
from collections.abc import Iterable
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn

from optim import ActivationPreconditioner
from optim.adamuon import AdaMuon
from optim.muon import Muon
from optim.process_group import local
from optim.signum import Signum
from tests.optim.models import mlp, randn, regression

WIDTHS = {
    "d_in": 12,
    "d": 7,
    "d_out": 5,
}  # with 4 processes, the last one has no row of the last layer
BASES = {
    "adamw": lambda params, group: torch.optim.AdamW(params, lr=1e-2, eps=1e-4),
    "sgd": lambda params, group: torch.optim.SGD(params, lr=1e-1, momentum=0.9, foreach=True),
    "signum": lambda params, group: Signum(params, lr=1e-3),
    "muon": lambda params, group: Muon(matrices(params), **MATRIX, process_group=group),
    "adamuon": lambda params, group: AdaMuon(matrices(params), **MATRIX, process_group=group),
}
FEW = ("adamw", "muon")  # elementwise, and of whole matrices
MATRIX = {"lr": 1e-2, "ns_dtype": "float32"}
N = 60  # tokens per step
LIMIT = timedelta(seconds=60)
TOLERANCE = 1e-5  # fp32 sums in a different order, amplified by the condition number of Σ


def in_process_group(function, *args):
    """Call `function(*args)` with torch.distributed initialised from torchrun's environment."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=LIMIT)
    result = function(*args)
    distributed.barrier()
    distributed.destroy_process_group()
    return result


def message_of(function, *args, **kwargs):
    """Return the type and message of the error that `function` raises."""
    with pytest.raises((ValueError, RuntimeError, FloatingPointError)) as caught:
        function(*args, **kwargs)
    return f"{type(caught.value).__name__}: {caught.value}"


def matrices(params):
    """Return the two-dimensional parameters."""
    return [param for param in params if param.dim() == 2]


def bounds(rank: int, size: int) -> tuple[int, int]:
    """Return the range of the N tokens that a process sees: uneven, and empty for one process."""
    ends = torch.tensor([7, 7, 30, N])[-size:] if size > 1 else torch.tensor([N])
    return (0 if rank == 0 else int(ends[rank - 1])), int(ends[rank])


def parts(base: str, how: str, device: str = "cpu", **settings):
    """Return the model, its DDP or FSDP2 wrapper, the optimizer and the preconditioner."""
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
    """Shard the model by FSDP2: over all processes ("fsdp"), or over pairs ("hsdp")."""
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
    """Take one step on the N tokens of batch `number`, each process on its part, in two passes."""
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


def full_tensor(tensor) -> Tensor:
    """Gather a sharded tensor, and move it to the CPU."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu()


def train(base: str, how: str, n_steps: int, settings: dict, device: str = "cpu"):
    """Return the weights, (Σ, P) of every layer and the norm ratios after n_steps."""
    model, forward, optimizer, preconditioner = parts(base, how, device, **settings)
    for number in range(n_steps):
        step(forward, optimizer, number)
    states = preconditioner.state_dict().values()
    return (
        [full_tensor(param).numpy() for param in model.parameters()],
        [(layer["sigma"].cpu().numpy(), layer["P"].cpu().numpy()) for layer in states],
        [row["norm_ratio"] for row in preconditioner.report()],
    )


def assert_trains_as_one_process(
    gang, size: int, how: str, settings: dict, bases: Iterable[str] = BASES
) -> None:
    """Compare five steps of optimizers in `size` processes with those of one process."""
    for base in bases:
        weights, layers, ratios = train(base, "alone", 5, settings)
        for found in gang.run(size, in_process_group, train, base, how, 5, settings):
            for ours, theirs in zip(found[0], weights, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, err_msg=base)
            for ours, theirs in zip(found[1], layers, strict=True):
                np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
            assert found[2] == pytest.approx(ratios, rel=1e-4)


COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "all_to_all_single", "reduce")


def counted(base: str, how: str, n_steps: int, settings: dict) -> list[dict[str, int]]:
    """Count the collectives of each step, except those inside DDP and FSDP2."""
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
    """Wrap `function` so that each call adds one to the last of `counts`."""

    def counted_call(*args, **kwargs):
        counts[-1][name] += 1
        return function(*args, **kwargs)

    return counted_call


def fingerprint(base: str, how: str, n_steps: int, settings: dict) -> tuple[str, str]:
    """Return a hash of the local weights, and one of all Σ and P, after n_steps."""
    model, forward, optimizer, preconditioner = parts(base, how, **settings)
    for number in range(n_steps):
        step(forward, optimizer, number)
    weights = [local(param.detach()) for param in model.parameters()]
    states = preconditioner.state_dict().values()
    statistics = [each for layer in states for each in (layer["sigma"], layer["P"])]
    return digest(weights), digest(statistics)


def digest(tensors: list[Tensor]) -> str:
    return hashlib.sha256(b"".join(each.numpy().tobytes() for each in tensors)).hexdigest()


def deflated(how: str):
    """Return U and P of one layer, wide enough for deflation, after two steps."""
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
