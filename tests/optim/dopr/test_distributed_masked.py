"""Masked tokens, empty steps and refusals with several processes."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from optim import ActivationPreconditioner
from optim.process_group import everybody
from tests.optim import distributed as workers
from tests.optim.distributed import full_tensor, in_process_group, message_of
from tests.optim.models import backward, mlp, regression

pytestmark = pytest.mark.xdist_group("gang")  # share one set of worker processes

TOLERANCE = 1e-5


def masked_training(how: str):
    """Return weights, Σ and counts of three steps in which most tokens of one process are masked.

    The last step masks all tokens of the last process.
    """
    model, forward, optimizer, preconditioner = workers.parts("adamw", how)
    size = distributed.get_world_size() if distributed.is_initialized() else 1
    rank = distributed.get_rank() if size > 1 else 0
    for number in range(3):
        x, target = regression(number, 64)
        mask = (torch.arange(64) % 3 != 0) & (torch.arange(64) < (32 if number == 2 else 50))
        x, target, mask = (each.chunk(size)[rank] for each in (x, target, mask))
        for part in torch.arange(len(x)).chunk(2):
            error = (forward(x[part]) - target[part]).square().sum(-1) * mask[part]
            (error.sum() * size / 64).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (
        [full_tensor(parameter).numpy() for parameter in model.parameters()],
        [layer["sigma"].numpy() for layer in preconditioner.state_dict().values()],
    )


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_masked_tokens_on_two_processes_are_those_of_one(gang, how):
    expected = masked_training("alone")
    for found in gang.run(2, in_process_group, masked_training, how):
        for a, b in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
            np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=TOLERANCE)


def empty_step(how: str):
    """Return the step numbers after an empty step, and after a step."""
    _, forward, optimizer, preconditioner = workers.parts("sgd", how)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    empty = [layer.step for layer in preconditioner.layers]
    workers.step(forward, optimizer, 0)
    return empty, [layer.step for layer in preconditioner.layers]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_an_empty_step_is_none_in_all_processes(gang, how):
    assert gang.run(2, in_process_group, empty_step, how) == [([0, 0], [1, 1])] * 2


def mixed_dtypes():
    """Take a step with a layer of each dtype; return the dtypes of P."""
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4).double()])
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    preconditioner = ActivationPreconditioner(layers, gamma=0.1, fresh_mean=True, refresh_every=2)
    preconditioner.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        layers[1](layers[0](torch.ones(3, 4)).double()).square().sum().backward()
        optimizer.step()
    return [str(layer.P.dtype) for layer in preconditioner.layers]


def test_layers_of_several_dtypes_have_fresh_means(gang):
    assert gang.run(2, in_process_group, mixed_dtypes) == [["torch.float32", "torch.float64"]] * 2


def empty_step_between_refreshes():
    _, forward, optimizer, preconditioner = workers.parts("sgd", "ddp", refresh_every=4)
    workers.step(forward, optimizer, 0)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return [layer.step for layer in preconditioner.layers]


def test_an_empty_step_between_refreshes_is_none_in_all_processes(gang):
    assert gang.run(2, in_process_group, empty_step_between_refreshes) == [[1, 1]] * 2


def resumed(how: str, state, at: int):
    """Return step, refreshes and tokens after a load and after the checkpoint helpers of torch."""
    model, forward, optimizer, preconditioner = workers.parts("adamw", how, refresh_every=4)
    preconditioner.load_state_dict(state)
    get_optimizer_state_dict(model, optimizer)  # takes a step with zero gradients
    keys = "step", "n_refreshes", "count"
    loaded = [[int(x[key]) for key in keys] for x in preconditioner.state_dict().values()]
    workers.step(forward, optimizer, at)
    return loaded, [(layer.step, layer.n_refreshes) for layer in preconditioner.layers]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("at", [4, 5, 6])
def test_the_checkpoint_helpers_of_torch_change_nothing_after_a_load(gang, how, at):
    _, forward, optimizer, preconditioner = workers.parts("adamw", "alone", refresh_every=4)
    for number in range(at):
        workers.step(forward, optimizer, number)
    before = [[at, 1 + (at > 4), (3 if at == 4 else at - 5) * workers.N]] * 2
    after = [(at + 1, 2)] * 2
    state = preconditioner.state_dict()
    assert gang.run(2, in_process_group, resumed, how, state, at) == [(before, after)] * 2


def masked_sample(how: str):
    """Step with one sequence in each process, all masked but a token of process 0, not sampled."""
    _, forward, optimizer, preconditioner = workers.parts("sgd", how, token_stride=4)
    mask = (torch.arange(8) == 3) & (distributed.get_rank() == 0)
    (forward(regression(0, 8)[0][None]).square().sum(-1) * mask).sum().backward()
    optimizer.step()
    return [(x.step, x.n_refreshes, x.n_fallbacks) for x in preconditioner.layers]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_sample_of_masked_tokens_is_a_fallback_in_all_processes(gang, how):
    assert gang.run(2, in_process_group, masked_sample, how) == [[(1, 0, 1)] * 2] * 2


def noticed_gradients(how: str):
    """Return whether a backward of each layer was noticed."""
    _, forward, _, preconditioner = workers.parts("sgd", how)
    forward(regression(0, 8)[0]).sum().backward()
    return [preconditioner._formed_grads.any([layer]) for layer in preconditioner.layers]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_the_gradients_of_a_backward_are_noticed(gang, how):
    assert gang.run(2, in_process_group, noticed_gradients, how) == [[True, True]] * 2


def attached_again():
    """Attach before and after torch.distributed starts; return the number of tokens of a step."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(optimizer)

    def rest():
        preconditioner.attach(optimizer)
        backward(model)
        optimizer.step()
        return [layer.n_refreshes for layer in preconditioner.layers]

    return in_process_group(rest)


def test_attach_may_be_repeated_after_the_process_group_exists(gang):
    assert gang.run(2, attached_again) == [[1, 1]] * 2


def groups_of_attachments():
    """Return how many process groups three preconditioners, one after the other, have made."""
    with pytest.MonkeyPatch.context() as patch:
        made, new_group = [], distributed.new_group
        patch.setattr(distributed, "new_group", lambda: made.append(new_group()) or made[-1])
        for _ in range(3):
            *_, preconditioner = workers.parts("sgd", "ddp")
            preconditioner.detach()
    return len(made)


def test_attachments_share_one_process_group(gang):
    for _ in range(2):  # the second time after the default group was destroyed and made again
        assert gang.run(2, in_process_group, groups_of_attachments) == [1, 1]


def is_default_group_freed():
    """Return whether nothing holds the default group, and so its store, once it is destroyed."""
    groups = []

    def make():
        groups.append(weakref.ref(distributed.group.WORLD))
        everybody()

    in_process_group(make)
    gc.collect()
    return groups[0]() is None


def test_a_default_group_that_was_destroyed_is_not_kept(gang):
    assert gang.run(2, is_default_group_freed) == [True, True]


def fsdp1(*, first: bool):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = mlp()
    preconditioner = ActivationPreconditioner(model, gamma=0.1) if first else None
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (preconditioner or ActivationPreconditioner(model, gamma=0.1)).attach(optimizer)


def zero1(*, inner: bool):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = mlp()
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=torch.optim.AdamW, lr=1e-3
    )
    ActivationPreconditioner(model, gamma=0.1).attach(optimizer.optim if inner else optimizer)


REFUSED = {
    "FSDP1, then DoPr": (fsdp1, {"first": False}, "FSDP1"),
    "DoPr, then FSDP1": (fsdp1, {"first": True}, "FSDP1"),
    "ZeRO-1": (zero1, {"inner": False}, "ZeRO-1"),
    "the optimizer inside ZeRO-1": (zero1, {"inner": True}, "ZeRO-1"),
}


def refusals():
    return {
        name: message_of(function, **arguments)
        for name, (function, arguments, _) in REFUSED.items()
    }


def test_what_cannot_be_preconditioned_is_refused_with_the_cure(gang):
    for messages in gang.run(2, in_process_group, refusals):
        for name, (*_, part) in REFUSED.items():
            assert part in messages[name], name
            assert "FSDP2" in messages[name] or "fully_shard" in messages[name], name
