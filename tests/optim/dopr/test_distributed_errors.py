"""Mistakes and faults with several processes raise the same error in all of them."""

import pytest
import torch
from torch import distributed, nn

from optim import ActivationPreconditioner
from tests.optim import distributed as workers
from tests.optim.distributed import in_process_group, message_of
from tests.optim.models import backward, mlp, randn

pytestmark = pytest.mark.xdist_group("gang")  # share one set of worker processes


def loaded_before_attach():
    preconditioner = ActivationPreconditioner(mlp(), gamma=0.1)
    return message_of(preconditioner.load_state_dict, {}), message_of(preconditioner.state_dict)


def test_a_state_before_attach_would_be_counted_once_per_process(gang):
    for messages in gang.run(2, in_process_group, loaded_before_attach):
        assert all("attach() was not called" in message for message in messages)


def sharded_after_attach():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    workers.sharded(model, "fsdp")
    backward(model)
    return message_of(optimizer.step)


def gathered_at_the_step():
    model, _, optimizer, _ = workers.parts("sgd", "fsdp")
    backward(model)
    model.unshard()
    for layer in (model[0], model[2]):
        layer.unshard()
    return message_of(optimizer.step)


@pytest.mark.parametrize("function", [sharded_after_attach, gathered_at_the_step])
def test_weights_that_took_the_place_of_others_are_noticed(gang, function):
    for message in gang.run(2, in_process_group, function):
        assert "0.weight, 2.weight was replaced after attach" in message


def with_columns_sharded_twice():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = mlp()
    mesh = init_device_mesh("cpu", (1, distributed.get_world_size()))
    layout = [Shard(1), Shard(1)]
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, layout))
    ActivationPreconditioner(model, gamma=0.1).attach(torch.optim.AdamW(model.parameters()))


def test_columns_that_are_sharded_over_two_mesh_dimensions_are_refused(gang):
    for message in gang.run(2, in_process_group, message_of, with_columns_sharded_twice):
        assert "0.weight cannot be preconditioned" in message
        assert "Shard(1)" in message


def with_other_layers():
    exclude = ["0"] if distributed.get_rank() == 1 else None
    model = mlp()
    preconditioner = ActivationPreconditioner(model, gamma=0.1, exclude=exclude)
    preconditioner.attach(torch.optim.AdamW(model.parameters()))


def test_processes_that_cover_other_layers_are_refused_in_all(gang):
    for message in gang.run(3, in_process_group, message_of, with_other_layers):
        assert "do not precondition the same layers" in message


def attached_too_early():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    backward(model)
    return in_process_group(message_of, optimizer.step)


def test_an_attach_before_the_process_group_is_noticed(gang):
    for message in gang.run(2, attached_too_early):
        assert "initialised after attach()" in message


def with_a_broken_sum(last_P):
    """Feed process 1 an activation that is not finite, in the second step or in the first."""
    model, _, optimizer, preconditioner = workers.parts("sgd", "ddp", count_masked=True)
    for number in range(2 if last_P else 1):
        x = randn(10, 12, seed=number)
        if distributed.get_rank() == 1 and number == last_P:
            x[3, 4] = torch.inf
        model(x)[:, 0].nan_to_num(0, 0, 0).sum().backward()
        for parameter in model.parameters():
            parameter.grad.zero_()
        optimizer.step()
        optimizer.zero_grad()
    return preconditioner.layers[0].n_fallbacks, workers.digest([preconditioner.layers[0].P])


def test_an_activation_that_is_not_finite_in_one_process_is_one_in_all(gang):
    for message in gang.run(2, in_process_group, message_of, with_a_broken_sum, False):
        assert "FloatingPointError: the first activations seen by 0" in message
    found = gang.run(2, in_process_group, with_a_broken_sum, True)
    assert found[0] == found[1]
    assert found[0][0] == 1


def with_an_owner_that_cannot_invert():
    from optim.dopr import refresh

    def no_inverse(*args):
        raise FloatingPointError("no inverse")

    _, forward, optimizer, preconditioner = workers.parts("sgd", "ddp")
    with pytest.MonkeyPatch.context() as patch:
        if distributed.get_rank() == 1:
            patch.setattr(refresh, "_batched_inverse_roots", no_inverse)
        message = message_of(workers.step, forward, optimizer, 0)
    return message, sum(layer.n_refreshes for layer in preconditioner.layers)


def test_an_inverse_that_fails_in_its_owner_fails_in_all_and_changes_nothing(gang):
    for message, n_refreshes in gang.run(2, in_process_group, with_an_owner_that_cannot_invert):
        assert "FloatingPointError" in message
        assert n_refreshes == 0
