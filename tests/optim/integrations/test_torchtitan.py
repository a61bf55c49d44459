"""What docs/integrations.md says of torchtitan: the form of its optimizers and its checkpoints."""

import pytest
import torch
from torch.distributed import checkpoint

from optim import ActivationPreconditioner
from tests.optim.models import backward, mlp


class Container(torch.optim.Optimizer):
    """Holds optimizers and steps them, as torchtitan's OptimizersContainer does."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        params = [p for each in optimizers for g in each.param_groups for p in g["params"]]
        super().__init__(params, {})

    def step(self, closure=None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def made():
    model = mlp()
    parts = [[model[0].weight, model[0].bias], [model[2].weight, model[2].bias]]
    container = Container([torch.optim.AdamW(part, lr=1e-2) for part in parts])
    preconditioner = ActivationPreconditioner(model, gamma=0.1, refresh_every=3)
    return model, container, preconditioner.attach(container)


def train(model, container, steps) -> None:
    for step in steps:
        backward(model, step)
        container.step()
        container.zero_grad()


@pytest.mark.filterwarnings("ignore")  # of torch: there is no process group
def test_a_distributed_checkpoint_restores_the_state_in_a_container(tmp_path):
    model, container, preconditioner = made()
    train(model, container, range(4))
    checkpoint.save({"dopr": preconditioner}, checkpoint_id=tmp_path)
    _, _, again = made()
    checkpoint.load({"dopr": again}, checkpoint_id=tmp_path)
    expected, found = preconditioner.state_dict(), again.state_dict()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert {layer["step"] for layer in found.values()} == {4}
