"""Signum against sign-SGD and against its formula."""

import pytest
import torch

from optim.signum import Signum, signum_update


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return small random integers, for which sums and products are exact."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def stepped(optimizer_class, grads, **settings) -> torch.Tensor:
    param = torch.nn.Parameter(integers(3, 4, seed=9))
    optimizer = optimizer_class([param], **settings)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


def test_momentum_zero_is_sign_sgd_bit_for_bit():
    grads = [integers(3, 4, seed=i) for i in range(5)]
    ours = stepped(Signum, grads, lr=0.125, momentum=0.0)
    sign_sgd = stepped(torch.optim.SGD, [grad.sign() for grad in grads], lr=0.125)
    assert torch.equal(ours, sign_sgd)


def test_decay_is_decoupled_and_comes_first():
    ours = stepped(Signum, [integers(3, 4)], lr=0.5, momentum=0.0, weight_decay=0.25)
    assert torch.equal(ours, integers(3, 4, seed=9) * (1 - 0.125) - 0.5 * integers(3, 4).sign())


def test_momentum_is_the_moving_average():
    first, second = integers(3, 4, seed=1), integers(3, 4, seed=2)
    buffer = torch.zeros(3, 4)
    signum_update([first], [buffer], momentum=0.75)
    (update,) = signum_update([second], [buffer], momentum=0.75)
    assert torch.equal(buffer, 0.1875 * first + 0.25 * second)
    assert torch.equal(update, buffer.sign())


def test_gradient_scale_does_not_matter():
    grads = [integers(3, 4, seed=i) for i in range(5)]
    large = stepped(Signum, [1024 * grad for grad in grads], lr=0.1)
    assert torch.equal(large, stepped(Signum, grads, lr=0.1))


def test_lr_mult_scales_the_update_and_not_the_decay():
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    Signum([{"params": [param], "lr_mult": 0.25}], lr=0.5, weight_decay=0.5).step()
    assert torch.equal(param.detach(), torch.full((2,), 0.75 - 0.125))


def test_parameters_without_gradient_are_left_alone():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = Signum([param], lr=0.5, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(param.detach(), torch.ones(2))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, r"Signum: lr=-1.0: must be in \[0, inf\)"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"momentum": 1.0}, r"momentum=1.0: must be in \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ],
)
def test_bad_numbers_are_named_with_their_value(settings, message):
    with pytest.raises(ValueError, match=message):
        Signum([torch.nn.Parameter(torch.ones(2))], **settings)


def test_a_group_with_bad_numbers_is_not_added():
    optimizer = Signum([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="lr_mult=-1"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr_mult": -1})
    assert len(optimizer.param_groups) == 1


def test_a_sparse_gradient_is_refused_before_anything_changes():
    dense = torch.nn.Parameter(torch.ones(2))
    sparse = torch.nn.Parameter(torch.ones(2))
    dense.grad, sparse.grad = torch.ones(2), torch.ones(2).to_sparse()
    optimizer = Signum([("dense", dense), ("table", sparse)])
    with pytest.raises(ValueError, match="does not support sparse: table"):
        optimizer.step()
    assert torch.equal(dense.detach(), torch.ones(2))


def test_complex_parameters_are_refused():
    with pytest.raises(ValueError, match="does not support complex: z"):
        Signum([("z", torch.nn.Parameter(torch.ones(2, dtype=torch.complex64)))])
