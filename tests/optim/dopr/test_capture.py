"""Capture in eager mode, with accumulation, checkpointing, autocast, copies and evaluation."""

import copy
import gc
import io
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from optim import ActivationPreconditioner
from tests.optim.models import (
    backward,
    covariance,
    mlp,
    randn,
    recorded,
    regression,
    relative_error,
)

FP32 = 1e-6  # a few roundings


def captured(model, **settings):
    """Return {name: capture} of the covered layers."""
    preconditioner = ActivationPreconditioner(model, gamma=0.1, **settings)
    return {layer.name: layer.capture for layer in preconditioner.layers}


def sigma(capture):
    return capture.gram[0] / capture.count


def test_sigma_is_the_second_moment_of_the_inputs():
    model = mlp()
    captures = captured(model)
    with recorded(model[0], model[2]) as inputs:
        backward(model)
    for capture, calls in zip(captures.values(), inputs, strict=True):
        assert capture.count == 64
        assert relative_error(sigma(capture), covariance(*calls)) < FP32


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 5, 7), (2, 3, 5, 7), (0, 7)])
@pytest.mark.parametrize("needs_input_gradient", [True, False])
def test_gradients_with_capture_equal_those_without(shape, needs_input_gradient):
    plain, layer = nn.Linear(7, 4), nn.Linear(7, 4)
    layer.load_state_dict(plain.state_dict())
    captures = captured(layer)
    inputs = [randn(*shape, seed=1).requires_grad_(needs_input_gradient) for _ in range(2)]
    for each, x in zip((plain, layer), inputs, strict=True):
        each(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    assert captures[""].count == inputs[0].numel() // 7


def test_gradients_of_a_float64_model_are_equal_to_fp64_rounding():
    plain, model = mlp().double(), mlp().double()
    captures = captured(model)
    backward(plain)
    backward(model)
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-12, atol=1e-14)
    assert captures["0"].gram.dtype == torch.float64


def test_ragged_accumulation_equals_one_batch():
    def after(parts):
        model, x = mlp(), regression(n=60)[0]
        preconditioner = ActivationPreconditioner(model, gamma=0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        preconditioner.attach(optimizer)
        for part in x.split(parts):
            (model(part).square().sum() / 60).backward()
        counts = [int(layer.capture.count) for layer in preconditioner.layers]
        optimizer.step()
        return counts, [layer.sigma for layer in preconditioner.layers], model[0].weight.grad

    counts, sigmas, M = after([60])
    ragged_counts, ragged_sigmas, ragged_M = after([1, 26, 33])
    assert ragged_counts == counts == [60, 60]
    for a, b in zip(ragged_sigmas, sigmas, strict=True):
        assert relative_error(a, b) < FP32
    assert relative_error(ragged_M, M) < 1e-5  # FP32 times the condition number, about 60


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_layer_counts_once(use_reentrant):
    model = mlp()
    captures = captured(model)
    x = regression()[0].requires_grad_()
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    assert [int(capture.count) for capture in captures.values()] == [64, 64]
    assert relative_error(sigma(captures["0"]), covariance(x.detach())) < FP32


def test_the_weight_of_the_first_layer_may_change_before_the_backward():
    model, plain, x = mlp(), mlp(), regression()[0]
    captured(model)
    for each in (model, plain):
        loss = each(x).square().mean()
        with torch.no_grad():
            each[0].weight.mul_(2)
        loss.backward()
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad)


def test_evaluation_in_between_changes_nothing():
    model = mlp()
    captures = captured(model)
    backward(model)
    before = {name: capture.gram.clone() for name, capture in captures.items()}
    model.eval()(regression(1)[0])  # gradients are enabled, but there is no backward
    with torch.no_grad():
        model(regression(2)[0])
    with torch.inference_mode():
        model(regression(3)[0])
    assert all(torch.equal(captures[name].gram, gram) for name, gram in before.items())


def test_a_layer_called_twice_captures_both_inputs():
    layer = nn.Linear(6, 6)
    captures = captured(layer)
    with recorded(layer) as (calls,):
        layer(torch.tanh(layer(randn(9, 6, seed=1)))).sum().backward()
    assert captures[""].count == 18
    assert relative_error(sigma(captures[""]), covariance(*calls)) < FP32


def test_a_second_backward_counts_tokens_as_often_as_it_adds_gradient():
    model = mlp()
    captures = captured(model)
    loss = model(regression()[0]).square().mean()
    loss.backward(retain_graph=True)
    once = captures["0"].gram.clone()
    loss.backward()
    assert captures["0"].count == 128
    assert torch.equal(captures["0"].gram, 2 * once)


def test_a_layer_that_is_frozen_for_a_pass_does_not_capture_it():
    model = mlp()
    captures = captured(model)
    model[2].requires_grad_(False)  # as GANs do with the discriminator
    backward(model)
    assert [int(capture.count) for capture in captures.values()] == [64, 0]
    model[2].requires_grad_(True)
    backward(model)
    assert [int(capture.count) for capture in captures.values()] == [128, 64]


@pytest.mark.parametrize("backward_inside", [True, False])
def test_under_bf16_autocast_the_weight_gradient_and_sigma_are_fp32(backward_inside):
    layer, z, grad_y = nn.Linear(64, 32), randn(128, 64, seed=1), randn(128, 32, seed=2)
    captures = captured(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(z)
        loss = (y.float() * grad_y).sum()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    z64, grad_y64 = z.bfloat16().double(), grad_y.bfloat16().double()
    assert y.dtype == torch.bfloat16
    assert relative_error(layer.weight.grad, grad_y64.mT @ z64) < FP32  # in bf16: 3e-3
    assert relative_error(layer.bias.grad, grad_y64.sum(0)) < FP32
    assert relative_error(sigma(captures[""]), covariance(z64)) < FP32


def test_backward_under_autocast_of_an_fp32_forward_stays_fp32():
    layer, z, grad_y = nn.Linear(64, 32), randn(128, 64, seed=1), randn(128, 32, seed=2)
    captures = captured(layer)
    y = layer(z)
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(grad_y)
    assert relative_error(layer.weight.grad, grad_y.double().mT @ z.double()) < FP32
    assert relative_error(sigma(captures[""]), covariance(z)) < FP32


def test_under_autocast_the_input_of_a_convolution_may_change_before_the_backward():
    layer, x = nn.Conv2d(3, 4, 2), randn(2, 3, 5, 5, seed=1)
    captures = captured(layer)
    patches = nn.functional.unfold(x.bfloat16().float(), 2).mT
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    x.zero_()
    y.float().square().sum().backward()
    assert relative_error(sigma(captures[""]), covariance(patches)) < FP32


def test_autocast_without_gradients_gives_the_same_output():
    layer, z = nn.Linear(64, 32), randn(128, 64, seed=1)
    captured(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(z)
        with torch.no_grad():
            assert torch.equal(layer(z), y)


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, lambda m: AveragedModel(m).module])
def test_a_copy_of_the_model_is_plain(copied):
    model = mlp()
    captures = captured(model)
    twin = copied(model)
    backward(twin)
    assert all(capture.count == 0 for capture in captures.values())
    assert relative_error(twin(regression()[0]), model(regression()[0])) == 0
    assert len(captured(twin)) == 2  # it can have a preconditioner of its own
    backward(twin)
    assert all(capture.count == 0 for capture in captures.values())


def test_a_pickled_model_loads_where_this_package_is_not_installed(tmp_path):
    model = mlp()
    captured(model)
    torch.save(model, tmp_path / "model.pt")
    load = f"import torch; print(torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False))"
    command = [sys.executable, "-I", "-c", load]  # -I: without the checkout on the path
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Linear(in_features=12" in done.stdout, done.stderr


class InPlaceEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, ids):
        h = self.table(ids)
        h += 1.0
        return h


IN_PLACE = {
    "convolution": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)),
        randn(2, 3, 6, 6, seed=1),
        {},
    ),
    "linear": (nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True)), randn(5, 6, seed=1), {}),
    "embedding": (InPlaceEmbedding(), torch.tensor([[1, 2, 2]]), {"embeddings": True}),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_the_model_may_change_the_output_of_a_layer_in_place(name):
    model, x, settings = IN_PLACE[name]
    plain = copy.deepcopy(model)
    captures = captured(model, **settings)
    for each in (model, plain):
        each(x).square().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert all(capture.count > 0 for capture in captures.values())


def test_captures_keep_no_graph_alive():
    model = mlp()
    captures = captured(model)
    x = regression()[0].requires_grad_()
    y = model(x)
    node = weakref.ref(y.grad_fn)
    y.sum().backward()
    del y
    gc.collect()
    assert node() is None
    assert all(capture.gram.grad_fn is None for capture in captures.values())


def test_the_state_dict_of_the_model_is_unchanged():
    model = mlp()
    before = list(model.state_dict())
    captured(model)
    assert list(model.state_dict()) == before


NOT_DENSE = {
    "jagged": lambda x: torch.nested.nested_tensor([x, x[1:]], layout=torch.jagged),
    "nested": lambda x: torch.nested.nested_tensor([x, x[1:]]),
    "sparse": lambda x: x.to_sparse(),
}


@pytest.mark.filterwarnings("ignore:.*prototype", "ignore:.*deprecated")  # torch's own
@pytest.mark.parametrize("form", NOT_DENSE)
@pytest.mark.parametrize("compiled", [False, True])
def test_an_input_that_is_not_dense_is_refused_by_the_name_of_the_layer(form, compiled):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(7, 4))
    captured(model)
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    x = NOT_DENSE[form](randn(5, 7, seed=1))
    with pytest.raises(RuntimeError, match=r"^0: its input is a nested or .*exclude=\['0'\]"):
        forward(x)
    with torch.no_grad():
        model(x)


def test_a_captured_layer_takes_its_input_by_name_and_refuses_other_types():
    layer = nn.Sequential(nn.Linear(3, 2))
    ActivationPreconditioner(layer, gamma=0.1)
    assert layer[0](input=torch.ones(1, 3)).shape == (1, 2)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.ones(1, 3, dtype=torch.int64))
