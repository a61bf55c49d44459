"""Muon against torch.optim.Muon, against an exact computation, and block by block."""

import copy
import math

import pytest
import torch

from optim import matrices
from optim.kernels.newton_schulz import orthogonalize
from optim.matrices import Matrices
from optim.muon import ADJUST_LR, Muon, iteration_dtype, orthogonalize_all

TORCH_LIKE = {"adjust_lr": "original", "ns_coefficients": "quintic", "weight_decay": 0.1}
SHAPES = [(8, 8), (16, 8), (8, 24), (8, 8)]
FP32 = {"rtol": 1e-5, "atol": 1e-6}  # a few roundings of numbers of order 1


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stepped(optimizer_class, shapes=SHAPES, steps: int = 3, group=None, **settings):
    """Return the parameters after `steps` steps from fixed weights with fixed gradients."""
    params = [torch.nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(shapes)]
    optimizer = optimizer_class([{"params": params, **(group or {})}], **settings)
    for step in range(steps):
        for i, param in enumerate(params):
            param.grad = randn(*param.shape, seed=100 * step + i)
        optimizer.step()
    return [param.detach() for param in params]


def reference_muon(param, grads, *, lr, momentum, nesterov, adjust_lr, weight_decay):
    """Return a matrix after heavy-ball momentum in double precision and fp32 iterations."""
    M = torch.zeros_like(param, dtype=torch.float64)
    for grad in grads:
        M = momentum * M + grad
        direction = (grad + momentum * M if nesterov else M).float()
        update = orthogonalize(direction, steps=5, ns_coefficients="quintic", dtype=torch.float32)
        param = param * (1 - lr * weight_decay) - lr * ADJUST_LR[adjust_lr](*param.shape) * update
    return param


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("adjust_lr", "adjust_lr_fn"), [("original", None), ("match_rms_adamw", "match_rms_adamw")]
)
def test_equals_torch_muon_up_to_bfloat16(adjust_lr, adjust_lr_fn, nesterov):
    settings = {"lr": 0.01, "nesterov": nesterov}
    like_torch = TORCH_LIKE | {"ns_dtype": "bfloat16", "adjust_lr": adjust_lr}
    ours = stepped(Muon, **like_torch, **settings)
    reference = stepped(torch.optim.Muon, adjust_lr_fn=adjust_lr_fn, **settings)
    for a, b in zip(ours, reference, strict=True):
        largest = 3 * 0.01 * ADJUST_LR[adjust_lr](*a.shape)  # three updates with entries below 1
        assert (a - b).abs().max() < 0.03 * largest  # bfloat16 resolves 2^-8, five iterations deep


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr", ADJUST_LR)
def test_equals_the_reference_with_fp32_iterations(adjust_lr, nesterov):
    settings = {"lr": 0.5, "momentum": 0.9, "nesterov": nesterov, "adjust_lr": adjust_lr}
    ours = stepped(
        Muon, ns_coefficients="quintic", ns_dtype="float32", weight_decay=0.1, **settings
    )
    for i, shape in enumerate(SHAPES):
        grads = [randn(*shape, seed=100 * step + i) for step in range(3)]
        expected = reference_muon(randn(*shape, seed=i), grads, weight_decay=0.1, **settings)
        torch.testing.assert_close(ours[i], expected, **FP32)


def test_by_default_the_iteration_is_in_float32_on_a_cpu_and_in_bfloat16_elsewhere():
    default, fp32, bf16 = (
        stepped(Muon, **settings)
        for settings in ({}, {"ns_dtype": "float32"}, {"ns_dtype": "bfloat16"})
    )
    assert all(torch.equal(a, b) for a, b in zip(default, fp32, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(default, bf16, strict=True))
    assert iteration_dtype("auto", torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stack_of_matrices_equals_one_at_a_time(dtype):
    matrices = [randn(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    settings = {"qkv_blocks": 1, "steps": 5, "ns_coefficients": "polar_express", "ns_dtype": dtype}
    stacked = orthogonalize_all(matrices, **settings)
    for matrix, batched in zip(matrices, stacked, strict=True):
        (alone,) = orthogonalize_all([matrix], **settings)
        torch.testing.assert_close(
            batched, alone, rtol=0, atol=1e-6 if dtype == "float32" else 0.02
        )


@pytest.mark.parametrize("adjust_lr", ADJUST_LR)
def test_fused_blocks_are_stepped_like_separate_matrices(adjust_lr):
    whole, parts = torch.nn.Parameter(randn(12, 6, seed=0)), []
    whole.grad = randn(12, 6, seed=1)
    for weight, grad in zip(whole.detach().split(4), whole.grad.split(4), strict=True):
        parts.append(torch.nn.Parameter(weight.clone()))
        parts[-1].grad = grad.clone()
    settings = {"lr": 1.0, "adjust_lr": adjust_lr, "ns_dtype": "float32"}
    Muon([{"params": [whole], "qkv_blocks": 3}], **settings).step()
    Muon(parts, **settings).step()
    torch.testing.assert_close(whole.detach(), torch.cat([p.detach() for p in parts]), **FP32)


def test_a_fused_weight_without_blocks_is_stepped_differently():
    one, three = (stepped(Muon, [(12, 6)], group={"qkv_blocks": n}, lr=1.0)[0] for n in (1, 3))
    assert (one - three).abs().max() > 0.1


def test_update_is_the_polar_factor_of_the_gradient_without_momentum():
    param = torch.nn.Parameter(torch.zeros(6, 4))
    param.grad = randn(6, 4, seed=3)
    Muon(
        [param], lr=1.0, momentum=0.0, adjust_lr="original", ns_steps=12, ns_dtype="float32"
    ).step()
    U, _, Vh = torch.linalg.svd(param.grad, full_matrices=False)
    torch.testing.assert_close(param.detach(), -math.sqrt(6 / 4) * U @ Vh, rtol=0, atol=1e-4)


def test_momentum_zero_makes_nesterov_irrelevant_bit_for_bit():
    plain, nesterov = (stepped(Muon, momentum=0.0, nesterov=n) for n in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, nesterov, strict=True))


def test_gradient_scale_does_not_matter():
    def step_with(factor: float) -> torch.Tensor:
        param = torch.nn.Parameter(torch.zeros(4, 4))
        param.grad = factor * randn(4, 4, seed=0)
        Muon([param], lr=1.0, ns_dtype="float32").step()
        return param.detach()

    torch.testing.assert_close(step_with(1e-12), step_with(1e12), **FP32)


@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (64, 256)])
def test_match_rms_gives_the_update_the_rms_of_adamw(shape):
    param = torch.nn.Parameter(torch.zeros(shape))
    param.grad = randn(*shape, seed=0)
    Muon([param], lr=1.0, ns_steps=8).step()
    assert param.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (64, 256)])
def test_unit_rms_norm_gives_outputs_of_equal_rms_change(shape):
    param = torch.nn.Parameter(torch.zeros(shape))
    param.grad = randn(*shape, seed=0)
    Muon([param], lr=1.0, adjust_lr="unit_rms_norm", ns_steps=8).step()
    norm = torch.linalg.matrix_norm(param.detach(), ord=2).item()
    assert norm == pytest.approx(math.sqrt(shape[0] / shape[1]), rel=0.02)


def test_a_zero_gradient_only_decays():
    param = torch.nn.Parameter(torch.ones(4, 4))
    param.grad = torch.zeros(4, 4)
    Muon([param], lr=0.5, weight_decay=0.5).step()
    assert torch.equal(param.detach(), torch.full((4, 4), 0.75))


@pytest.mark.parametrize("adjust_lr", ADJUST_LR)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_a_parameter_without_elements_is_left_alone(shape, adjust_lr):
    empty, other = stepped(Muon, [shape, (4, 4)], adjust_lr=adjust_lr)
    assert empty.shape == shape
    assert not torch.equal(other, randn(4, 4, seed=1))


def test_lr_mult_scales_the_update_and_not_the_decay():
    weight = randn(8, 8, seed=0)
    decayed = weight * (1 - 0.25 * 0.5)
    (one,) = stepped(Muon, [(8, 8)], 1, lr=0.25, weight_decay=0.5)
    (half,) = stepped(Muon, [(8, 8)], 1, group={"lr_mult": 0.5}, lr=0.25, weight_decay=0.5)
    torch.testing.assert_close(half - decayed, (one - decayed) / 2, **FP32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"adjust_lr": "match_rmsprop"},
            "adjust_lr='match_rmsprop': must be one of match_rms_adamw, unit_rms_norm",
        ),
        ({"ns_coefficients": "cubic"}, "ns_coefficients='cubic'"),
        (
            {"ns_coefficients": [(3.0, -4.0, 2.0)]},
            r"ns_coefficients=\[\(3.0, .*\)\]: must be one of polar_express, quintic",
        ),
        ({"ns_dtype": "float16"}, "ns_dtype='float16': must be one of auto, bfloat16, float32"),
        ({"ns_steps": 0}, "ns_steps=0: must be an integer, at least 1"),
        ({"momentum": 1.0}, "Muon: momentum=1.0"),
        ({"lr": float("inf")}, "Muon: lr=inf"),
    ],
)
def test_bad_settings_are_named_with_their_value(settings, message):
    with pytest.raises(ValueError, match=message):
        Muon([torch.nn.Parameter(torch.ones(2, 2))], **settings)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_only_matrices_are_accepted_and_others_named(shape):
    with pytest.raises(ValueError, match=r"only supports 2D parameters; odd is \("):
        Muon([("odd", torch.nn.Parameter(torch.ones(shape)))])


def test_rows_must_be_divisible_into_the_blocks():
    group = {"params": [("c_attn", torch.nn.Parameter(torch.ones(4, 4)))], "qkv_blocks": 3}
    with pytest.raises(ValueError, match=r"c_attn is \(4, 4\).*qkv_blocks=3"):
        Muon([group])


def test_the_layout_of_the_matrices_is_computed_again_only_if_they_change(monkeypatch):
    layouts = []
    monkeypatch.setattr(
        matrices, "Matrices", lambda *args: layouts.append(args[0]) or Matrices(*args)
    )
    first, second, third = (torch.nn.Parameter(randn(4, 4, seed=i)) for i in range(3))
    optimizer = Muon([{"params": [first, second]}], lr=0.1)

    def step(*params):
        optimizer.zero_grad()
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()

    for params in ([first, second], [first, second], [first], [first, second]):
        step(*params)
    optimizer.add_param_group({"params": [third]})
    for _ in range(2):
        step(first, second, third)
    wanted = [[first, second], [first], [first, second], [third]]
    assert [list(map(id, each)) for each in layouts] == [list(map(id, each)) for each in wanted]
    optimizer = copy.deepcopy(optimizer)  # has parameters of its own
    step(*optimizer.param_groups[0]["params"])
    assert len(layouts) == 5
