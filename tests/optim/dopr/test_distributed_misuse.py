"""What a stranger may get wrong with several processes is an error, not a silent change."""

import pytest
import torch

from optim import ActivationPreconditioner
from tests.optim import distributed as workers
from tests.optim.distributed import grouped, message_of
from tests.optim.models import backward, mlp

pytestmark = pytest.mark.xdist_group("gang")  # one gang of processes for all of them


def loaded_before_attach():
    preconditioner = ActivationPreconditioner(mlp(), gamma=0.1)
    return message_of(preconditioner.load_state_dict, {}), message_of(preconditioner.state_dict)


def test_a_state_before_attach_would_be_counted_once_per_process(gang):
    for messages in gang.run(2, grouped, loaded_before_attach):
        assert all("attach first" in message for message in messages)


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
    for message in gang.run(2, grouped, function):
        assert "0.weight, 2.weight: another Parameter than at attach" in message
