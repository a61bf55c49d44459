"""Accelerate saves and restores a registered preconditioner."""

import pytest
import torch

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from torch.utils.data import DataLoader

from optim import ActivationPreconditioner
from tests.optim.integrations.tiny import assert_equal, weights
from tests.optim.models import mlp, regression

SETTINGS = {"gamma": 0.1, "refresh_every": 3, "sigma_beta": 0.9}  # state that outlives a step


class Run:
    """A model, an optimizer and a preconditioner that one Accelerator has prepared."""

    def __init__(self, accumulate: int = 1) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        data = DataLoader([regression(step, n=16) for step in range(8)], batch_size=None)
        self.model, self.optimizer, self.data = self.accelerator.prepare(model, optimizer, data)
        plain = self.accelerator.unwrap_model(self.model)
        preconditioner = ActivationPreconditioner(plain, **SETTINGS).attach(self.optimizer)
        self.accelerator.register_for_checkpointing(preconditioner)

    def train(self, steps: range) -> dict[str, torch.Tensor]:
        for i, (x, target) in enumerate(self.data):
            if i not in steps:
                continue
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward((self.model(x) - target).square().mean())
                self.optimizer.step()
                self.optimizer.zero_grad()
        return weights(self.model)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    whole, first, again = Run(), Run(), Run()
    first.train(range(4))
    first.accelerator.save_state(str(tmp_path))
    again.accelerator.load_state(str(tmp_path))
    assert_equal(again.train(range(4, 8)), whole.train(range(8)))


def test_a_step_that_only_accumulates_is_none():
    run = Run(accumulate=2)
    run.train(range(8))
    (preconditioner,) = run.accelerator._custom_objects
    assert {layer["step"] for layer in preconditioner.state_dict().values()} == {4}
