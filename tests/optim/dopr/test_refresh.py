"""A refresh of many layers: its host reads, its memory, and the state after an error."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

import optim.dopr.refresh
from optim import ActivationPreconditioner
from optim.kernels import dense_root
from tests.optim.models import randn

READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "equal", "numpy")
aten = torch.ops.aten


class Calls(TorchFunctionMode):
    """Count the calls by which Python reads a tensor."""

    n = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.n += getattr(func, "__name__", "") in READS
        return func(*args, **kwargs or {})


class Operators(TorchDispatchMode):
    """Count the operators whose output shape depends on the data."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func in (aten.nonzero.default, aten.masked_select.default)
        is_index = func in (aten.index.Tensor, aten.index_put_.default)
        self.n += is_index and any(i is not None and i.dtype == torch.bool for i in args[1])
        return func(*args, **kwargs or {})


def host_reads(function) -> int:
    """Count how often `function` would make the host wait for the device."""
    with Calls() as calls, Operators() as operators:
        function()
    return calls.n + operators.n


def stack(n_layers: int, d: int = 8, **settings):
    """Return a chain of equal layers after one backward, its optimizer and its preconditioner."""
    model = nn.Sequential(*(nn.Linear(d, d, bias=False) for _ in range(n_layers)))
    preconditioner = ActivationPreconditioner(model, gamma=0.1, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    preconditioner.attach(optimizer)
    model(randn(4 * d, d, seed=1)).square().sum().backward()
    return model, optimizer, preconditioner


@pytest.mark.parametrize("inverse", ["cholesky", "newton_schulz"])
@pytest.mark.parametrize("exponent", [1, 2])
def test_the_host_reads_of_a_refresh_do_not_grow_with_the_layers(inverse, exponent, monkeypatch):
    monkeypatch.setattr(dense_root, "is_inverted_in_blocks", lambda _: False)  # as on a GPU
    counts = [host_reads(stack(n, inverse=inverse, exponent=exponent)[1].step) for n in (1, 4, 40)]
    assert counts[0] == counts[1] == counts[2] <= 5


def test_a_step_without_a_refresh_reads_nothing():
    model, optimizer, _ = stack(4, refresh_every=10)
    optimizer.step()
    model(randn(9, 8, seed=2)).square().sum().backward()
    assert host_reads(optimizer.step) == 0


def reads_of_a_step(n_layers: int, n_used: int) -> int:
    """Count the host reads of a second step, before which a backward used the first layers only."""
    model, optimizer, _ = stack(n_layers)
    optimizer.step()
    model.zero_grad(set_to_none=False)  # zero gradients
    if n_used:
        model[:n_used](randn(32, 8, seed=2)).square().sum().backward()
    return host_reads(optimizer.step)


def test_layers_that_were_not_used_cost_one_more_read(monkeypatch):
    monkeypatch.setattr(dense_root, "is_inverted_in_blocks", lambda _: False)  # as on a GPU
    assert reads_of_a_step(2, 1) == reads_of_a_step(20, 10) == reads_of_a_step(20, 20) + 1


def test_a_step_that_no_backward_precedes_costs_one_read():
    assert reads_of_a_step(2, 0) == reads_of_a_step(20, 0) == 1


def step_bytes(n_layers: int, d: int, **settings) -> float:
    """Return the peak memory that the first step adds, as a multiple of the memory of all Σ."""
    how = {"profile_memory": True, "acc_events": True}  # torch 2.11 warns without acc_events
    with profile(activities=[ProfilerActivity.CPU], **how) as records:
        _, optimizer, preconditioner = stack(n_layers, d, **settings)
        with record_function("the step"):
            optimizer.step()
    events = sorted(records.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held, before, most = 0, None, 0
    for event in events:
        held += event.nbytes() if event.name() == "[memory]" else 0
        before = held if event.name() == "the step" else before
        most = max(most, held - before) if before is not None else 0
    return most / sum(layer.sigma.nbytes for layer in preconditioner.layers)


# Cholesky takes 5.5 from Python 3.11 on. Python 3.10 keeps arguments until a call returns: 7.5
@pytest.mark.parametrize(("inverse", "factor"), [("cholesky", 8), ("newton_schulz", 8)])
def test_an_inverse_takes_a_few_times_the_memory_of_its_sigma(inverse, factor):
    assert step_bytes(4, d=256, inverse=inverse) < factor


def test_many_layers_are_inverted_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(optim.dopr.refresh, "CHUNK_BYTES", 4 * 256 * 256)  # one layer of 16
    assert step_bytes(16, d=256) < 1 + 9 / 16  # the new P of all layers, and the temporaries of one


@pytest.mark.parametrize("per_chunk", [0, 1, 2, 3])
def test_chunks_of_any_size_give_the_same_bits(monkeypatch, per_chunk):
    whole, parts = stack(5), stack(5)
    parts[0].load_state_dict(whole[0].state_dict())
    for source, target in zip(whole[2].layers, parts[2].layers, strict=True):
        target.capture.gram.copy_(source.capture.gram)
    whole[1].step()
    monkeypatch.setattr(
        optim.dopr.refresh, "CHUNK_BYTES", per_chunk * whole[2].layers[0].sigma.nbytes
    )
    parts[1].step()
    for a, b in zip(whole[2].layers, parts[2].layers, strict=True):
        assert torch.equal(a.P, b.P)
        assert torch.equal(a.sigma, b.sigma)


def test_an_error_in_the_last_chunk_leaves_the_layers_of_the_first_as_they_were(monkeypatch):
    model, optimizer, preconditioner = stack(3)
    optimizer.step()
    monkeypatch.setattr(optim.dopr.refresh, "CHUNK_BYTES", 1)
    model(randn(32, 8, seed=2)).square().sum().backward()
    preconditioner.layers[-1].capture.gram[0, 0, 1] = (
        torch.nan
    )  # the mean eigenvalue does not show it
    before = [(layer.P, layer.sigma, layer.state_dict()) for layer in preconditioner.layers]
    Gs = [layer.covered.weight.grad.clone() for layer in preconditioner.layers]
    with pytest.raises(FloatingPointError, match="not finite"):
        optimizer.step()
    for layer, (P, sigma, state), G in zip(preconditioner.layers, before, Gs, strict=True):
        assert (layer.P is P, layer.sigma is sigma) == (True, True)
        assert all(getattr(layer, key) == state[key] for key in layer.NUMBERS)
        assert torch.equal(layer.covered.weight.grad, G)


def test_layers_on_any_schedule_share_a_refresh_with_layers_of_other_shapes():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(6, 4), nn.Embedding(3, 2))
    preconditioner = ActivationPreconditioner(model, gamma=0.1, embeddings=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    preconditioner.attach(optimizer)
    (model[:3](randn(30, 6, seed=1)).sum() + model[3](torch.tensor([0, 1, 1])).sum()).backward()
    optimizer.step()
    assert [layer.n_refreshes for layer in preconditioner.layers] == [1, 1, 1, 1]
    for layer in preconditioner.layers[:3]:
        mean = layer.sigma[0].trace() / layer.covered.d_in
        A = layer.sigma[0] + layer.damping * torch.eye(layer.covered.d_in)
        torch.testing.assert_close(A @ layer.P[0] / mean, torch.eye(layer.covered.d_in))
