"""Changes of the model after construction are refused or reported, never ignored."""

import gc
import logging
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from optim import ActivationPreconditioner
from tests.optim.models import backward, mlp, randn, regression


def attached(model, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = ActivationPreconditioner(model, gamma=0.1, **settings).attach(optimizer)
    return optimizer, preconditioner


def trained(model, optimizer, n_steps=1):
    for step in range(n_steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def square():
    return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Linear(12, 5))


def tie(model):
    model[2].weight = model[0].weight


def replace(model):
    model[2] = nn.Linear(12, 12)


def remove(model):
    del model[2]


def freeze(model):
    model[2].requires_grad_(False)


def resize(model):
    model[2].weight = nn.Parameter(torch.zeros(12 * 12))


CHANGES = [
    (tie, r"2\.weight was tied"),
    (replace, r"2\.weight was replaced"),
    (remove, r"2\.weight was replaced or removed"),
    (resize, r"2\.weight changed its shape from \(12, 12\) to \(144,\) \(FSDP1"),
]


@pytest.mark.parametrize(("change", "message"), [*CHANGES, (freeze, r"2\.weight was frozen")])
def test_a_model_that_changed_before_attach_is_refused(change, message):
    model = square()
    preconditioner = ActivationPreconditioner(model, gamma=0.1)
    change(model)
    with pytest.raises(RuntimeError, match=f"{message}.*construct and attach a new one"):
        preconditioner.attach(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(("change", "message"), CHANGES[:2])
def test_a_layer_that_is_replaced_or_tied_later_is_refused_at_the_next_refresh(change, message):
    model = square()
    optimizer, _ = attached(model)
    trained(model, optimizer)
    change(model)
    backward(model)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


REPARAMETRIZED = [
    lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    parametrizations.weight_norm,
    pytest.param(
        nn.utils.spectral_norm,  # the old one: its weight does not require a gradient
        marks=pytest.mark.filterwarnings("ignore:.*spectral_norm.*deprecated"),
    ),
]


@pytest.mark.parametrize("change", REPARAMETRIZED)
@pytest.mark.parametrize("is_attached", [False, True])
def test_a_weight_that_is_reparametrized_is_refused_with_the_cause(change, is_attached):
    model = square()
    preconditioner = ActivationPreconditioner(model, gamma=0.1)
    if is_attached:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        preconditioner.attach(optimizer)
    change(model[2])
    if is_attached:
        backward(model)
        with pytest.raises(RuntimeError, match=r"2\.weight was replaced .* reparametrizing it"):
            optimizer.step()
    else:
        with pytest.raises(RuntimeError, match=r"2\.weight was pruned or reparametrized"):
            preconditioner.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    preconditioner.detach()
    ActivationPreconditioner(model, gamma=0.1).attach(torch.optim.SGD(model.parameters(), lr=0.1))


def warnings_of(caplog):
    return [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]


def test_weights_that_are_added_or_unfrozen_later_are_reported_once(caplog):
    model = square()
    freeze(model)
    optimizer, preconditioner = attached(model)
    trained(model, optimizer)
    model[2].requires_grad_(True)
    model[3] = nn.Sequential(model[3], nn.Linear(5, 5))
    trained(model, optimizer, n_steps=3)
    (warning,) = warnings_of(caplog)
    assert "trained without preconditioning" in warning
    assert "2.weight, 3.1.weight" in warning
    rows = {row["name"]: (row["covered"], row["reason"][:3]) for row in preconditioner.report()}
    assert rows["2.weight"] == rows["3.1.weight"] == (False, "new")
    assert "covers 2 weights" in preconditioner.summary()


def test_a_covered_weight_that_is_frozen_later_is_reported_once(caplog):
    model = square()
    optimizer, preconditioner = attached(model)
    trained(model, optimizer)
    freeze(model)
    trained(model, optimizer, n_steps=2)
    (warning,) = warnings_of(caplog)
    assert "covered, but frozen now" in warning
    assert [row["covered"] for row in preconditioner.report()] == [True, True, False]


def test_the_report_speaks_of_the_model_as_it_is():
    model = square()
    _, preconditioner = attached(model)
    replace(model)
    rows = {row["name"]: row for row in preconditioner.report()}
    assert not rows["2.weight"]["covered"]
    assert "replaced" in rows["2.weight"]["reason"]
    assert "not covered: 2.weight (was replaced" in preconditioner.summary()


def test_a_model_that_does_not_change_is_compared_once(monkeypatch):
    model = square()
    optimizer, preconditioner = attached(model)
    monkeypatch.setattr(preconditioner._census, "lost", lambda: pytest.fail("compared again"))
    trained(model, optimizer, n_steps=3)


def test_the_summary_gives_the_share_of_the_parameters_and_is_the_repr():
    model = mlp()  # 12 x 9 and 9 x 5 weights, 9 + 5 biases
    _, preconditioner = attached(model)
    assert f"covers 2 weights ({153 / 167:.0%} of the parameters)" in preconditioner.summary()
    assert repr(preconditioner) == preconditioner.summary()
    preconditioner.detach()
    assert "detached" in repr(preconditioner)


@pytest.mark.parametrize(
    ("settings", "n_warnings"), [({}, 1), ({"exclude": ["table"]}, 0), ({"embeddings": True}, 0)]
)
def test_coverage_below_half_is_a_warning_unless_it_was_asked_for(caplog, settings, n_warnings):
    model = nn.ModuleDict({"table": nn.Embedding(50, 8), "head": nn.Linear(8, 8)})
    ActivationPreconditioner(model, gamma=0.1, **settings)
    assert len(warnings_of(caplog)) == n_warnings


def test_a_second_preconditioner_is_refused_with_the_cure():
    model = mlp()
    first = ActivationPreconditioner(model, gamma=0.1)
    with pytest.raises(ValueError, match=r"another preconditioner .* detach\(\)"):
        ActivationPreconditioner(model, gamma=0.1)
    first.detach()
    ActivationPreconditioner(model, gamma=0.1)


def test_a_second_preconditioner_of_some_of_the_layers_is_refused():
    model = square()
    ActivationPreconditioner(model, gamma=0.1, include=["0"])
    with pytest.raises(ValueError, match=r"0\.weight .*another preconditioner"):
        ActivationPreconditioner(model, gamma=0.1)
    ActivationPreconditioner(model, gamma=0.1, exclude=["0"])


def test_detaching_keeps_a_forward_that_others_put_around_ours():
    model, x = mlp(), regression()[0]
    _, preconditioner = attached(model)
    inner = model[0].forward
    model[0].forward = lambda z: 2 * inner(z)
    before = model(x)
    preconditioner.detach()
    assert torch.equal(model(x), before)
    model(x).sum().backward()


def test_a_model_that_is_dropped_without_detaching_is_freed():
    model = mlp()
    optimizer, preconditioner = attached(model)
    trained(model, optimizer)
    references = [weakref.ref(each) for each in (model, preconditioner, model[0].weight)]
    del model, optimizer, preconditioner
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_detaching_frees_the_statistics():
    model = mlp()
    optimizer, preconditioner = attached(model)
    trained(model, optimizer)
    P = weakref.ref(preconditioner.layers[0].P)
    preconditioner.detach()
    gc.collect()
    assert P() is None


def test_a_lazy_module_that_is_added_later_does_not_disturb_a_step():
    model = mlp()
    optimizer, preconditioner = attached(model)
    trained(model, optimizer)
    model.lazy = nn.LazyLinear(3)
    backward_of_first_layers = model[2](torch.tanh(model[0](regression()[0])))
    backward_of_first_layers.square().sum().backward()
    gradients = [layer.weight.grad.clone() for layer in (model[0], model[2])]
    optimizer.step()
    assert [layer.step for layer in preconditioner.layers] == [2, 2]
    for layer, gradient in zip((model[0], model[2]), gradients, strict=True):
        assert not torch.allclose(layer.weight.grad, gradient)  # it is M now


def test_layers_that_are_frozen_in_turn_are_not_said_to_need_a_new_preconditioner(caplog):
    model = square()
    optimizer, _ = attached(model)
    for step in range(6):
        for i, layer in enumerate((model[0], model[2], model[3])):
            layer.requires_grad_(i == step % 3)
        trained(model, optimizer)
    assert not any("construct" in warning for warning in warnings_of(caplog))


def test_a_forward_that_was_replaced_on_the_instance_is_refused_with_the_cure():
    model = mlp()
    for layer in (model[0], model[2]):
        layer.forward = layer.forward
        layer._hf_hook = object()  # what accelerate leaves
    with pytest.raises(ValueError, match="remove_hook_from_module"):
        ActivationPreconditioner(model, gamma=0.1)


def test_load_state_dict_with_assign_after_attach_is_refused_with_the_cure():
    model = mlp()
    optimizer, _ = attached(model)
    model.load_state_dict(mlp(seed=1).state_dict(), assign=True)
    backward(model)
    with pytest.raises(RuntimeError, match=r"load_state_dict\(assign=True\)"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_weights_of_low_precision_are_refused_by_their_dtype(dtype):
    model = nn.Sequential(nn.Linear(4, 4).to(dtype))
    with pytest.raises(ValueError, match=f"its dtype is {dtype}: keep weights in float32"):
        ActivationPreconditioner(model, gamma=0.1)


def test_data_parallel_is_refused_with_the_cure(monkeypatch):
    model = nn.DataParallel(mlp())
    ActivationPreconditioner(model, gamma=0.1).detach()  # without GPUs it runs the model itself
    monkeypatch.setattr(model, "device_ids", [0, 1])
    with pytest.raises(ValueError, match="use DistributedDataParallel"):
        ActivationPreconditioner(model, gamma=0.1)


def test_an_input_on_another_device_is_refused():
    layer = nn.Sequential(nn.Linear(4, 4))
    ActivationPreconditioner(layer, gamma=0.1)
    with pytest.raises(RuntimeError, match=r"input is on meta, but the weight is on cpu"):
        layer(randn(3, 4, seed=1).to("meta"))


def test_recording_a_cuda_graph_is_refused(monkeypatch):
    from optim.kernels.operators import check_not_recording

    check_not_recording(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"CUDA graph.*torch\.cuda\.graph"):
        check_not_recording(torch.device("cuda"))
