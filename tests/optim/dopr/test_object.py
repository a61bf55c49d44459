"""Attaching, detaching and reporting."""

import pytest
import torch
from torch import nn

from optim import ActivationPreconditioner
from tests.optim.models import backward, mlp, randn

# -- attach


def sgd(*modules):
    return torch.optim.SGD([p for m in modules for p in m.parameters()], lr=0.1)


def test_only_optimizers_can_be_attached():
    model = mlp()
    preconditioner = ActivationPreconditioner(model, gamma=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(sgd(model))
    with pytest.raises(TypeError, match="ConstantLR is not a torch"):
        preconditioner.attach(scheduler)
    preconditioner.attach(sgd(model))  # the call that raised changed nothing


@pytest.mark.parametrize(
    ("owners", "message"),
    [
        (lambda m: [sgd(m[0])], r"2\.weight is in 0 of them:"),
        (lambda m: [sgd(m), sgd(m[2])], r"2\.weight is in 2 of them:"),
        (lambda m: [sgd(mlp())], r"0\.weight is in 0 of them; 2\.weight is in 0 of them"),
        (lambda m: [], r"0\.weight is in 0 of them; 2\.weight is in 0 of them"),
    ],
)
def test_every_covered_weight_must_be_in_one_optimizer(owners, message):
    model = mlp()
    preconditioner = ActivationPreconditioner(model, gamma=0.1)
    with pytest.raises(ValueError, match=message):
        preconditioner.attach(*owners(model))
    assert preconditioner.attach(sgd(model)) is preconditioner


def test_an_attach_that_fails_leaves_no_captures():
    model = mlp()
    first = ActivationPreconditioner(model, gamma=0.1)
    for _ in range(2):
        with pytest.raises(ValueError, match="is in 0 of them"):
            first.attach(sgd(mlp()))
        assert not any("forward" in vars(module) for module in model.modules())
    optimizer = sgd(model)
    first.attach(optimizer)
    backward(model)
    optimizer.step()
    assert [layer.n_refreshes for layer in first.layers] == [1, 1]


def test_after_an_attach_that_fails_another_one_can_take_the_model_and_keeps_it():
    model = mlp()
    first = ActivationPreconditioner(model, gamma=0.1)
    with pytest.raises(ValueError, match="is in 0 of them"):
        first.attach(sgd(mlp()))
    second = ActivationPreconditioner(model, gamma=0.1).attach(sgd(model))
    with pytest.raises(RuntimeError, match="lost its capturing forward"):
        first.attach(sgd(model))
    first.detach()
    backward(model)
    assert [int(layer.capture.count) for layer in second.layers] == [64, 64]


def test_a_second_attach_that_fails_keeps_the_captures(monkeypatch):
    model = mlp()
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(sgd(model))
    monkeypatch.setattr(type(preconditioner), "_misses_processes", True)  # so it may be repeated
    with pytest.raises(ValueError, match="is in 0 of them"):
        preconditioner.attach(sgd(mlp()))
    backward(model)
    assert preconditioner.layers[0].capture.count == 64


def test_a_second_attach_is_refused():
    model = mlp()
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(sgd(model))
    with pytest.raises(ValueError, match=r"attached already: .* detach\(\), construct a new"):
        preconditioner.attach(sgd(model))


@pytest.mark.parametrize(
    ("move", "message"),
    [
        (lambda model: model.double(), r"0\.weight is torch\.float64 on cpu.*float32 on cpu"),
        (lambda model: model.to("meta"), r"0\.weight is torch\.float32 on meta.*on its device"),
    ],
)
def test_a_model_that_was_moved_or_cast_after_construction_is_refused(move, message):
    model = mlp()
    preconditioner = ActivationPreconditioner(model, gamma=0.1)
    with pytest.raises(ValueError, match=message):
        preconditioner.attach(sgd(move(model)))
    assert (
        ActivationPreconditioner(mlp().bfloat16(), gamma=0.1).layers[0].sigma.dtype == torch.float32
    )


def test_a_model_without_values_is_refused():
    model = mlp().to("meta")
    preconditioner = ActivationPreconditioner(model, gamma=0.1)
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device.*construct the"):
        preconditioner.attach(sgd(model))


def test_a_model_that_was_cast_after_attach_is_refused_at_the_refresh():
    model = mlp()
    optimizer = sgd(model)
    ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    backward(model.double())
    with pytest.raises(ValueError, match=r"0\.weight is torch\.float64 .* construct"):
        optimizer.step()


# -- detach


def test_detach_leaves_no_trace():
    model, plain = mlp(), mlp()
    attributes = [set(vars(module)) for module in model.modules()]
    optimizer, other = sgd(model), sgd(plain)
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    layers = preconditioner.layers
    preconditioner.detach()
    assert [set(vars(module)) for module in model.modules()] == attributes
    for each, stepped in ((model, optimizer), (plain, other)):
        backward(each)
        stepped.step()
    assert torch.equal(model[0].weight, plain[0].weight)
    assert all(layer.capture.count == 0 for layer in layers)


def test_after_detach_there_can_be_another_but_not_the_same():
    model = mlp()
    preconditioner = ActivationPreconditioner(model, gamma=0.1)
    preconditioner.detach()
    assert {row["reason"] for row in preconditioner.report()} == {"the preconditioner was detached"}
    preconditioner.detach()
    with pytest.raises(ValueError, match="detached: construct a new"):
        preconditioner.attach(sgd(model))
    ActivationPreconditioner(model, gamma=0.1).attach(sgd(model))


# -- report


def test_the_report_before_the_first_step_has_no_numbers_yet():
    row = ActivationPreconditioner(mlp(), gamma=0.1).report()[0]
    assert (row["condition"], row["norm_ratio"], row["fallbacks"]) == (None, None, 0)


@pytest.mark.parametrize("block_diagonal", [None, 4])
def test_the_report_gives_condition_norm_ratio_and_memory(block_diagonal):
    layer = nn.Linear(12, 5)
    optimizer = sgd(layer)
    settings = {"gamma": 0.05, "block_diagonal": block_diagonal}
    preconditioner = ActivationPreconditioner(layer, **settings).attach(optimizer)
    x = randn(40, 12, seed=1) * torch.logspace(0, -1, 12)
    layer(x).square().sum().backward()
    G = layer.weight.grad.clone()
    optimizer.step()
    (row,) = preconditioner.report(condition=True)
    b = block_diagonal or 12
    sigma = x.double().mT @ x.double() / 40
    mean = sigma.trace() / 12
    sigma *= torch.arange(12)[:, None] // b == torch.arange(12) // b
    values = torch.linalg.eigvalsh(sigma) + 0.05 * mean
    assert row["condition"] == pytest.approx((values[-1] / values[0]).item(), rel=1e-4)
    assert row["norm_ratio"] == pytest.approx((layer.weight.grad.norm() / G.norm()).item())
    assert (row["bytes"], row["block_width"]) == (3 * 4 * 12 * b, b)
    assert (row["name"], row["shape"], row["covered"], row["fallbacks"]) == (
        "weight",
        (5, 12),
        True,
        0,
    )


def test_the_report_has_condition_numbers_on_request_only(monkeypatch):
    layer = nn.Linear(12, 5)
    optimizer = sgd(layer)
    preconditioner = ActivationPreconditioner(layer, gamma=0.1).attach(optimizer)
    layer(randn(40, 12, seed=1)).sum().backward()
    optimizer.step()
    assert preconditioner.report(condition=True)[0]["condition"] > 1
    monkeypatch.setattr(torch.linalg, "eigvalsh", None)  # too expensive for every report
    assert preconditioner.report()[0]["condition"] is None


def test_the_condition_number_counts_the_damping_of_a_mended_block_in_that_block_only():
    layer = nn.Linear(4, 3)
    preconditioner = ActivationPreconditioner(layer, gamma=1e-3, block_diagonal=2)
    optimizer = sgd(layer)
    preconditioner.attach(optimizer)
    layer(randn(40, 4, seed=1)).sum().backward()
    (state,) = preconditioner.layers
    state.capture.gram[1] = torch.tensor([[40.0, 40.0], [40.0, 39.0]])  # indefinite
    optimizer.step()
    assert state.damping[1] >= 10 * state.damping[0]
    A = torch.block_diag(*(state.sigma + state.damping[:, None, None] * torch.eye(2)))
    values = torch.linalg.eigvalsh(A.double())
    condition = preconditioner.report(condition=True)[0]["condition"]
    assert condition == pytest.approx((values[-1] / values[0]).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("d", "widest", "is_narrow"), [(13, 8, True), (12, 8, False), (4, 8, False)]
)
def test_blocks_of_less_than_half_the_width_asked_for_are_named_once(d, widest, is_narrow, caplog):
    model = nn.ModuleDict({"odd": nn.Linear(d, 8), "even": nn.Linear(16, 8)})
    ActivationPreconditioner(model, gamma=0.1, block_diagonal=widest)
    found = [each.getMessage() for each in caplog.records]
    assert len(found) == is_narrow
    assert all("odd (blocks of 1; 13 divides its 13 inputs). Set" in each for each in found)


def test_the_report_has_one_row_for_every_weight_matrix():
    model = nn.ModuleDict({"table": nn.Embedding(4, 3), "head": nn.Linear(3, 4)})
    rows = ActivationPreconditioner(model, gamma=0.1).report()
    assert {row["name"]: (row["covered"], row["shape"]) for row in rows} == {
        "head.weight": (True, (4, 3)),
        "table.weight": (False, (4, 3)),
    }
    assert rows[0].keys() == rows[1].keys()
    assert rows[1]["reason"] == "an embedding (embeddings=False)"
