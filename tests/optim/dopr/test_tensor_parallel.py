"""Tensor parallelism: column-parallel and row-parallel layers train as those of one process."""

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

from optim import ActivationPreconditioner
from optim.muon import Muon
from tests.optim.distributed import (
    BASES,
    COLLECTIVES,
    TOLERANCE,
    counting,
    full_tensor,
    in_process_group,
    message_of,
)
from tests.optim.models import mlp, regression

pytestmark = pytest.mark.xdist_group("gang")  # share one set of worker processes

N = 30  # tokens per step
WIDTH = 8  # of the hidden layer
SETTINGS = {
    "exact": {},
    "fast": {"refresh_every": 2, "sigma_beta": 0.9},
    "fresh mean": {"refresh_every": 3, "sigma_beta": 0.9, "fresh_mean": True},
    "blocks": {"block_diagonal": 4},
    "masked tokens counted": {"count_masked": True},
    "rare": {"refresh_every": 4, "collect_every": 2, "fresh_mean": True},
}
ELEMENTWISE = ("adamw", "sgd", "signum")


def slow(name, *more):
    return pytest.param(name, *more, marks=pytest.mark.slow)


def parallel():
    """Return the model, and the part of the batch that this process sees.

    With two processes, the layers are tensor-parallel over both; with four, over pairs, and FSDP2
    shards their rows over the others.
    """
    model = mlp(d=WIDTH)
    model[1] = nn.ReLU()
    if not distributed.is_initialized():
        return model, slice(0, N)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    replicas = distributed.get_world_size() // 2
    mesh = init_device_mesh("cpu", (replicas, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if replicas == 1:
        return model, slice(0, N)
    fully_shard(model, mesh=mesh["dp"])
    return model, (slice(0, 7), slice(7, N))[mesh.get_local_rank("dp")]


def steps(model, rows, optimizer, numbers):
    """Take the steps with these numbers; a third of the tokens of each are masked."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    replicas = distributed.get_world_size() // 2 if distributed.is_initialized() else 1
    for number in numbers:
        x, target = (each[rows] for each in regression(number, N))
        mask = (torch.arange(N) % 3 != 0)[rows, None]
        error = (model(x) - target) * mask
        (error.square().sum() * replicas / N).backward()  # FSDP2 takes the mean
        nn.utils.clip_grad_norm_(weights, 0.5)
        optimizer.step()
        optimizer.zero_grad()


def train(base: str, settings: dict):
    """Return the weights, Σ and P, and the ratios of norms after five steps."""
    model, rows = parallel()
    optimizer = BASES[base](list(model.parameters()), None)
    preconditioner = ActivationPreconditioner(model, gamma=0.1, **settings).attach(optimizer)
    steps(model, rows, optimizer, range(5))
    states = preconditioner.state_dict().values()
    return (
        [full_tensor(parameter).numpy() for parameter in model.parameters()],
        [state[key].numpy() for state in states for key in ("sigma", "P")],
        [row["norm_ratio"] for row in preconditioner.report()],
    )


def assert_all_close(found, expected, **tolerance) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **tolerance)


def assert_equals_one_process(gang, size: int, settings: dict, bases):
    for base in bases:
        weights, statistics, ratios = train(base, settings)
        for found in gang.run(size, in_process_group, train, base, settings):
            assert_all_close(found[0], weights, atol=TOLERANCE, err_msg=base)
            assert_all_close(found[1], statistics, rtol=1e-4, atol=1e-5, err_msg=base)
            assert found[2] == pytest.approx(ratios, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "bases"),
    [
        ("exact", ELEMENTWISE),
        ("fresh mean", ("adamw",)),
        *(slow(name, ELEMENTWISE) for name in SETTINGS if name != "exact"),
    ],
)
def test_two_tensor_parallel_processes_train_as_one(gang, name, bases):
    assert_equals_one_process(gang, 2, SETTINGS[name], bases)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
@pytest.mark.parametrize(
    "name", [name if name == "fresh mean" else slow(name) for name in SETTINGS]
)
def test_fsdp2_over_tensor_parallel_pairs_trains_as_one_process(gang, name):
    assert_equals_one_process(gang, 4, SETTINGS[name], bases=("adamw",))


def tokens_seen_by_one_half():
    """Return Σ, and the number of tokens whose hidden features are zero in one half only."""
    model, _ = parallel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    x, target = regression(0, N)
    (model(x) - target).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        is_dead = [half.amax(-1) <= 0 for half in model[:1](x).chunk(2, dim=-1)]
    states = [*preconditioner.state_dict().values()]
    return states[0]["sigma"].numpy(), int((is_dead[0] != is_dead[1]).sum())


def test_a_token_counts_if_any_process_has_a_gradient_for_it(gang):
    sigma, n = tokens_seen_by_one_half()
    assert n > 0  # else this test shows nothing
    for found, _ in gang.run(2, in_process_group, tokens_seen_by_one_half):
        np.testing.assert_allclose(found, sigma, rtol=1e-5, atol=1e-6)


class Sent(TorchDispatchMode):
    """Count the numbers that DTensor sends from this process, by collective."""

    def __init__(self):
        super().__init__()
        self.numel = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if function.namespace == "_c10d_functional" and name.startswith(("all_", "reduce_")):
            self.numel[name] = self.numel.get(name, 0) + args[0].numel()
        return function(*args, **(kwargs or {}))


def sent(settings: dict | None):
    """Return, per step, what DTensor sends in the backward; None: without DoPr."""
    model, rows = parallel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if settings is not None:
        ActivationPreconditioner(model, gamma=0.1, **settings).attach(optimizer)
    counts = []
    for number in range(3):
        x, target = (each[rows] for each in regression(number, N))
        loss = (model(x) - target).square().sum() / N
        with Sent() as mode:
            loss.backward()
        counts.append(mode.numel)
        optimizer.step()
        optimizer.zero_grad()
    return counts


@pytest.fixture(scope="module")
def sent_without_dopr(gang):
    return gang.run(2, in_process_group, sent, None)[0]


GATHERED = {"all_gather_into_tensor": N * WIDTH // 2}  # half of the row-parallel layer's z


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"count_masked": True}, [GATHERED] * 3),
        ({"count_masked": True, "refresh_every": 2}, [GATHERED] * 3),
        ({"count_masked": True, "refresh_every": 2, "collect_every": 2}, [GATHERED, {}, GATHERED]),
        (
            {"count_masked": True, "refresh_every": 2, "collect_every": 2, "fresh_mean": True},
            [GATHERED, {}, GATHERED],
        ),
        ({}, [GATHERED | {"all_reduce": N}] * 3),  # which tokens of the column-parallel layer count
    ],
)
def test_the_input_of_a_row_parallel_layer_travels_only_if_it_is_collected(
    gang, sent_without_dopr, settings, expected
):
    found, _ = gang.run(2, in_process_group, sent, settings)
    added = [
        {key: now[key] - before.get(key, 0) for key in now if now[key] != before.get(key, 0)}
        for now, before in zip(found, sent_without_dopr, strict=True)
    ]
    assert added == expected


def gradient_messages():
    """Return the collectives of torch.distributed in a step without a refresh."""
    model, rows = parallel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ActivationPreconditioner(model, gamma=0.1, refresh_every=2).attach(optimizer)
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(distributed, name, counting(name, getattr(distributed, name), counts))
        for number in range(2):
            counts.append(dict.fromkeys(COLLECTIVES, 0))
            steps(model, rows, optimizer, [number])
    return {name: n for name, n in counts[1].items() if n}


def test_columns_of_the_gradient_go_to_one_process_and_back(gang):
    assert gang.run(2, in_process_group, gradient_messages) == [{"all_to_all_single": 2}] * 2


def continued(base: str, settings: dict, before: int, state=None):
    """Train `before` steps, or load their state; return the state and the weights after 5."""
    model, rows = parallel()
    optimizer = BASES[base](list(model.parameters()), None)
    preconditioner = ActivationPreconditioner(model, gamma=0.1, **settings).attach(optimizer)
    if state is not None:
        preconditioner.load_state_dict(state)
    steps(model, rows, optimizer, range(before))
    return preconditioner.state_dict(), [full_tensor(x).numpy() for x in model.parameters()]


def test_a_state_of_tensor_parallel_processes_loads_in_one_and_back(gang):
    settings = SETTINGS["fresh mean"]
    alone, _ = continued("sgd", settings, 2)
    parallel_state = gang.run(2, in_process_group, continued, "sgd", settings, 2)[0][0]
    _, expected = continued("sgd", settings, 3, alone)
    _, loaded = continued("sgd", settings, 3, parallel_state)
    runs = gang.run(2, in_process_group, continued, "sgd", settings, 3, alone)
    for found in (loaded, *(weights for _, weights in runs)):
        assert_all_close(found, expected, atol=TOLERANCE)


def compiled():
    """Return the weights after three steps of compiled code."""
    model, rows = parallel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = SETTINGS["fresh mean"]
    ActivationPreconditioner(model, gamma=0.1, **settings).attach(optimizer)
    is_parallel = distributed.is_initialized()
    forward = torch.compile(model) if is_parallel else model
    steps(forward, rows, optimizer, range(3))
    return [full_tensor(parameter).numpy() for parameter in model.parameters()]


@pytest.mark.slow
def test_compiled_tensor_parallel_layers_are_captured(gang):
    expected = compiled()
    for found in gang.run(2, in_process_group, compiled):
        assert_all_close(found, expected, atol=TOLERANCE)


def with_autocast():
    """Return Σ after a step whose forward runs in bf16."""
    model, rows = parallel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        model(regression(0, N)[0][rows]).square().sum().backward()
    optimizer.step()
    return [state["sigma"].numpy() for state in preconditioner.state_dict().values()]


def test_autocast_sums_the_rounded_inputs(gang):
    alone = with_autocast()
    for found in gang.run(2, in_process_group, with_autocast):
        np.testing.assert_allclose(found[0], alone[0], rtol=1e-6)  # exact: inputs are the same
        np.testing.assert_allclose(found[1], alone[1], rtol=0.02, atol=0.02)


def with_kept_gradients(in_place: bool):
    """Return the weights after steps whose gradients are set to zero in place, not removed."""
    model, rows = parallel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = ActivationPreconditioner(model, gamma=0.1, refresh_every=2, collect_every=2)
    preconditioner.attach(optimizer)
    for number in range(4):
        x, target = (each[rows] for each in regression(number, N))
        with preconditioner.paused():
            (5 * model(x)).square().sum().backward()
        for parameter in model.parameters():
            parameter.grad.zero_()  # pyright: ignore
        ((model(x) - target).square().sum() / N).backward()
        optimizer.step()
        optimizer.step()  # leaves M as it is
        optimizer.zero_grad(set_to_none=not in_place)
    steps_taken = [layer.step for layer in preconditioner.layers]
    return steps_taken, [full_tensor(parameter).numpy() for parameter in model.parameters()]


def test_gradients_that_are_zeroed_in_place_are_preconditioned_in_every_step(gang):
    _, expected = with_kept_gradients(False)
    for in_place in (False, True):
        for taken, found in gang.run(2, in_process_group, with_kept_gradients, in_place):
            assert taken == [4, 4]
            assert_all_close(found, expected, atol=TOLERANCE)


def strided_means():
    """Return the means of the row-parallel layer for equal tokens, of which some are masked."""
    model, _ = parallel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    settings = {"refresh_every": 4, "collect_every": 4, "token_stride": 4, "fresh_mean": True}
    preconditioner = ActivationPreconditioner(model, gamma=0.1, **settings).attach(optimizer)
    x = regression(0, 1)[0].expand(8, 12)
    mask = torch.tensor([1, 1, 0, 0, 1, 0, 0, 0])[:, None]
    means = []
    for _ in range(3):
        (model(x) * mask).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        means.append(preconditioner.layers[1].mean.flatten().numpy())
    return means


def test_all_features_of_a_mean_come_from_the_same_tokens(gang):
    model = mlp(d=WIDTH)
    z = torch.relu(model[0](regression(0, 1)[0])).detach().numpy()[0]
    for means in gang.run(2, in_process_group, strided_means):
        for mean in means:
            np.testing.assert_allclose(mean, z, rtol=1e-5, atol=1e-6)


def column_parallel_only(statistics: Any):
    """Train one column-parallel layer, whose statistics may be sharded; return its weight."""
    model: Any = nn.Sequential(mlp(d=WIDTH)[0])
    if distributed.is_initialized():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        parallelize_module(model, mesh, {"0": ColwiseParallel(output_layouts=Replicate())})
    optimizer = Muon([model[0].weight], lr=1e-2, ns_dtype="float32")
    preconditioner = ActivationPreconditioner(model, gamma=0.1, statistics=statistics)
    preconditioner.attach(optimizer)
    for number in range(3):
        x = regression(number, N)[0]
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return full_tensor(model[0].weight).numpy(), [x.owner for x in preconditioner.layers]


@pytest.mark.parametrize(("statistics", "owner"), [("auto", 0), ("replicated", None)])
def test_muon_trains_column_parallel_layers(gang, statistics, owner):
    expected, _ = column_parallel_only(statistics)
    for found, owners in gang.run(2, in_process_group, column_parallel_only, statistics):
        assert owners == [owner]
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def of_two_stages():
    """Train another model in each process, as in a pipeline; return the weights."""
    rank = distributed.get_rank() if distributed.is_initialized() else None
    found = []
    groups = [distributed.new_group([0]), distributed.new_group([1])] if rank is not None else None
    for stage in (0, 1) if rank is None else (rank,):
        model = mlp(d=WIDTH + stage)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        preconditioner = ActivationPreconditioner(model, gamma=0.1)
        preconditioner.attach(optimizer, process_group=groups[stage] if groups else None)
        steps(model, slice(0, N), optimizer, range(2))
        found.append([parameter.detach().numpy() for parameter in model.parameters()])
    return found


def test_each_stage_of_a_pipeline_has_a_process_group_of_its_own(gang):
    expected = of_two_stages()
    for stage, (found,) in enumerate(gang.run(2, in_process_group, of_two_stages)):
        for ours, theirs in zip(found, expected[stage], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def refused(case: str):
    """Do what is not supported, and return the message of the error."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
    from torch.distributed.tensor.placement_types import _StridedShard

    if case == "embedding":
        mesh = init_device_mesh("cpu", (2,))
        model = nn.Sequential(nn.Embedding(8, 4))
        parallelize_module(model, mesh, {"0": RowwiseParallel()})
        preconditioner = ActivationPreconditioner(model, gamma=0.1, embeddings=True)
        preconditioner.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        return message_of(model, torch.arange(8))
    model: Any
    model, rows = parallel()
    if case == "too few processes":
        alone = [distributed.new_group([rank]) for rank in range(2)][distributed.get_rank()]
        preconditioner = ActivationPreconditioner(model, gamma=0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return message_of(preconditioner.attach, optimizer, process_group=alone)
    if case == "not attached":
        ActivationPreconditioner(model, gamma=0.1)
        return message_of(model, torch.ones(3, 12))
    if case == "columns sharded twice":
        mesh = init_device_mesh("cpu", (1, 2))
        layout = [_StridedShard(1, split_factor=2), Shard(1)]
        weight = DTensor.from_local(torch.ones(4, 3), mesh, layout)
        model = nn.Sequential(nn.Linear(6, 4))
        model[0].weight = nn.Parameter(weight)
        preconditioner = ActivationPreconditioner(model, gamma=0.1)
        return message_of(preconditioner.attach, torch.optim.SGD(model.parameters(), lr=0.1))
    if case == "muon":
        return message_of(lambda: steps(model, rows, Muon([model[2].weight], lr=0.1), range(1)))
    if case == "sharded statistics":
        preconditioner = ActivationPreconditioner(model, gamma=0.1, statistics="sharded")
        return message_of(preconditioner.attach, torch.optim.SGD(model.parameters(), lr=0.1))
    preconditioner = ActivationPreconditioner(model, gamma=0.1)
    preconditioner.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    if case == "sharded tokens":
        mesh = model[0].weight.device_mesh
        z = DTensor.from_local(torch.ones(3, 12), mesh, [Shard(0)])
        with contextlib.ExitStack() as stack:
            hooks = model[0]._forward_pre_hooks
            stack.callback(hooks.update, dict(hooks))
            hooks.clear()
            return message_of(model[0], z)
    raise AssertionError(case)


REFUSALS = {
    "embedding": "only nn.Linear may be tensor-parallel",
    "muon": "only rows may be sharded",
    "sharded statistics": "use statistics='replicated'",
    "too few processes": "which are not in the process group",
    "not attached": "call attach() before a forward with gradients",
    "columns sharded twice": "columns may be sharded over one mesh dimension only",
    "sharded tokens": "neither column-parallel nor row-parallel",
}


def all_refused():
    return {case: refused(case) for case in REFUSALS}


def test_what_is_not_supported_is_refused(gang):
    for messages in gang.run(2, in_process_group, all_refused):
        for case, part in REFUSALS.items():
            assert part in messages[case], case
