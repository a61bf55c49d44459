"""Capture under torch.compile equals capture in eager mode."""

import shutil

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from optim import ActivationPreconditioner
from tests.devices import DEVICES
from tests.optim.models import randn, relative_error

# torch's compiler calls deprecated functions of torch
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Net(nn.Module):
    """Combine one layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.conv = nn.Embedding(10, 6), nn.Conv2d(1, 2, 3)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, idx):  # (B, T) -> (B, T, 3)
        h = self.embedding(idx)
        h = h + self.conv(h[:, None]).mean((1, 2, 3))[:, None, None]
        return self.second(torch.tanh(self.first(h)))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def trained(compiled=None, *, steps: int = 9, device: str = "cpu", **settings):
    """Train a Net by DoPr-SGD, compiled by `compiled`; return it and its preconditioner."""
    net = Net().to(device)
    preconditioner = ActivationPreconditioner(net, gamma=0.1, embeddings=True, **settings)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    preconditioner.attach(optimizer)
    forward = compiled(net) if compiled else net
    for step in range(steps):
        idx = torch.randint(10, (4, 5), generator=torch.Generator().manual_seed(step)).to(device)
        (forward(idx) - idx[..., None] / 10).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, preconditioner


def assert_equal(one, other):
    for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert relative_error(a, b) < 1e-5  # fused kernels round differently
    for a, b in zip(one[1].layers, other[1].layers, strict=True):
        assert relative_error(a.sigma, b.sigma) < 1e-5


def inductor(net):
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    return torch.compile(net, fullgraph=True)


def aot_eager(net):
    return torch.compile(net, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("compiled", "settings"),
    [
        (aot_eager, {"refresh_every": 4, "collect_every": 2}),
        pytest.param(inductor, {}, marks=pytest.mark.slow),
        pytest.param(inductor, {"refresh_every": 4, "collect_every": 2}, marks=pytest.mark.slow),
    ],
)
def test_compiled_training_equals_eager_training(compiled, settings, device):
    settings = {**settings, "device": device}
    with torch.backends.cudnn.flags(
        allow_tf32=False
    ):  # TF32 in the convolution would round differently
        assert_equal(trained(compiled, **settings), trained(**settings))


def test_a_plain_net_of_the_same_class_compiled_earlier_does_not_switch_capture_off():
    aot_eager(Net())(torch.zeros(4, 5, dtype=torch.long)).sum().backward()
    assert_equal(trained(aot_eager), trained())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, 1), ({"refresh_every": 4, "collect_every": 4, "token_stride": 2}, 2)],
)
def test_the_collect_flag_makes_two_graphs_and_step_and_offset_none(settings, expected):
    n_graphs = 0

    def backend(graph, inputs):
        nonlocal n_graphs
        n_graphs += 1
        return graph.forward

    trained(lambda net: torch.compile(net, backend=backend, fullgraph=True), **settings)
    assert n_graphs == expected


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_compiled_checkpointed_layer_counts_once(use_reentrant):
    layer = nn.Linear(6, 4)
    preconditioner = ActivationPreconditioner(layer, gamma=0.1)
    x = randn(10, 6, seed=1).requires_grad_()
    forward = torch.compile(
        lambda x: checkpoint(layer, x, use_reentrant=use_reentrant), backend="aot_eager"
    )
    forward(x).square().sum().backward()
    assert preconditioner.layers[0].capture.count == 10


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_under_bf16_autocast_the_weight_gradient_and_sigma_are_fp32(device):
    layer = nn.Linear(64, 32).to(device)
    z, grad_y = randn(128, 64, seed=1).to(device), randn(128, 32, seed=2).to(device)
    capture = ActivationPreconditioner(layer, gamma=0.1).layers[0].capture
    with torch.autocast(device, torch.bfloat16):
        y = inductor(layer)(z)
    (y.float() * grad_y).sum().backward()
    z64, grad_y64 = z.bfloat16().double(), grad_y.bfloat16().double()
    assert relative_error(layer.weight.grad, grad_y64.mT @ z64) < 1e-6  # a few roundings
    assert relative_error(capture.gram[0], z64.mT @ z64) < 1e-6


def test_a_preconditioner_made_after_compiling_sees_the_activations_too():
    net = nn.Sequential(nn.Linear(6, 4))
    forward = torch.compile(net, backend="aot_eager")
    forward(randn(10, 6, seed=1)).sum().backward()
    capture = ActivationPreconditioner(net, gamma=0.1).layers[0].capture
    forward(randn(10, 6, seed=1)).sum().backward()
    assert capture.count == 10


def test_after_detach_a_compiled_model_captures_no_more():
    net = nn.Sequential(nn.Linear(6, 4))
    preconditioner = ActivationPreconditioner(net, gamma=0.1)
    capture = preconditioner.layers[0].capture
    forward = torch.compile(net, backend="aot_eager")
    forward(randn(10, 6, seed=1)).sum().backward()
    preconditioner.detach()
    forward(randn(10, 6, seed=1)).sum().backward()
    assert capture.count == 10
