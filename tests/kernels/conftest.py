"""Fixtures of the kernels' tests."""

import pytest
import torch

from tests.kernels.memory import guarded, is_intact


@pytest.fixture
def poisoned(monkeypatch):
    """Whatever a launcher allocates is NaN at first, and has guards that must stay NaN."""
    allocate, buffers = torch.Tensor.new_empty, []

    def new_empty(self, size, **options):
        if size == 0:  # Triton's interpreter makes its own views of memory from this
            return allocate(self, size, **options)
        view, buffer = guarded(allocate(self, size, **options).fill_(torch.nan))
        buffers.append(buffer)
        return view

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    assert all(is_intact(buffer) for buffer in buffers)
