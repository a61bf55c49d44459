"""Fixtures for the tests of the kernels."""

import pytest
import torch

from tests.kernels.memory import guarded, is_intact


@pytest.fixture
def poisoned(monkeypatch):
    """Fill every buffer that a kernel launcher allocates with NaN, and check its guards."""
    allocate, buffers = torch.Tensor.new_empty, []

    def new_empty(self, size, **options):
        if size == 0:  # Triton's interpreter creates its views of memory this way
            return allocate(self, size, **options)
        view, buffer = guarded(allocate(self, size, **options).fill_(torch.nan))
        buffers.append(buffer)
        return view

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    assert all(is_intact(buffer) for buffer in buffers)
