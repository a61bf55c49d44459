"""Backward passes inside `paused()` do not change the statistics, wherever the forward ran."""

import pytest
import torch
from torch import nn

from optim import ActivationPreconditioner
from tests.optim.models import backward, mlp, randn, regression
from tests.optim.runs import assert_same, made


class Net(nn.Module):
    """Combine one layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.conv = nn.Embedding(10, 6), nn.Conv2d(1, 2, 3)
        self.linear = nn.Linear(6, 3)

    def forward(self, idx):  # (B, T) -> (B, T, 3)
        h = self.embedding(idx)
        return self.linear(h) + self.conv(h[:, None]).mean()


IDX = torch.arange(20).reshape(4, 5) % 10


def sums(preconditioner):
    captures = [layer.capture for layer in preconditioner.layers]
    return [each.clone() for c in captures for each in (c.gram, c.count, c.offset)]


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def every_kind():
    net = Net()
    return net, ActivationPreconditioner(net, gamma=0.1, embeddings=True)


def test_a_backward_inside_adds_nothing_and_has_the_same_gradients():
    (net, preconditioner), (twin, twins) = every_kind(), every_kind()
    before = sums(preconditioner)
    with preconditioner.paused():
        net(IDX).square().sum().backward()
    twin(IDX).square().sum().backward()
    assert same(sums(preconditioner), before)
    assert not any(same([a], [b]) for a, b in zip(sums(twins)[::3], before[::3], strict=True))
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_counts_is_where_the_backward_runs(compiled):
    torch._dynamo.reset()
    net, preconditioner = every_kind()
    forward = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
    before = sums(preconditioner)
    y = forward(IDX)
    with preconditioner.paused():
        y.sum().backward()
        assert same(sums(preconditioner), before)
        y = forward(IDX)
    y.sum().backward()
    assert [int(layer.capture.count) for layer in preconditioner.layers] == [20, 48, 20]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by torch's compiler itself
def test_a_pause_does_not_compile_again():
    torch._dynamo.reset()
    net, preconditioner = every_kind()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    forward = torch.compile(net, backend=counter)
    forward(IDX).sum().backward()
    with preconditioner.paused():
        forward(IDX).sum().backward()
    assert counter.frame_count == 1
    assert preconditioner.layers[0].capture.count == 20


def test_it_nests_and_an_error_ends_it():
    model, _, preconditioner = made()
    with preconditioner.paused():
        with pytest.raises(ZeroDivisionError), preconditioner.paused():
            raise ZeroDivisionError
        backward(model)
        assert preconditioner.layers[0].capture.count == 0
    backward(model)
    assert preconditioner.layers[0].capture.count == 64


def test_preconditioners_pause_by_themselves():
    (model, _, preconditioner), (other, _, others) = made(), made()
    with preconditioner.paused():
        backward(model)
        backward(other)
    counts = [each.layers[0].capture.count for each in (preconditioner, others)]
    assert counts == [0, 64]


def test_a_step_inside_keeps_the_schedule_and_the_pause():
    model, optimizer, preconditioner = made(refresh_every=4, collect_every=2)
    for step in range(6):
        backward(model, step)
        optimizer.step()
        if step == 0:
            pause = preconditioner.paused()
            pause.__enter__()
        if step == 2:
            assert (
                preconditioner.layers[0].capture.count == 0
            )  # step 2 would collect without the pause
            pause.__exit__(None, None, None)
    assert [layer.n_refreshes for layer in preconditioner.layers] == [2, 2]
    assert [layer.step for layer in preconditioner.layers] == [6, 6]


def test_a_sum_that_is_not_finite_stays_out():
    model, optimizer, preconditioner = made()
    with preconditioner.paused():
        model(torch.full((3, 12), torch.nan)).sum().backward()
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


# -- use cases


def test_gradients_of_inputs_inside_leave_training_as_it_was():
    parts, twin = made(), made()
    x = regression(9)[0].requires_grad_()
    for step in range(3):
        for model, optimizer, preconditioner in (parts, twin):
            if model is parts[0]:
                with preconditioner.paused():
                    torch.autograd.grad(model(x).sum(), x)
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(parts, twin)


def test_the_other_player_of_a_gan_leaves_no_trace():
    player, optimizer, preconditioner = parts = made()
    twin, generator = made(), mlp(4, 8, 12, seed=1)
    for step in range(3):
        with preconditioner.paused():
            player(generator(randn(30, 4, seed=step))).sum().backward()
        optimizer.zero_grad()
        for each in (parts, twin):
            backward(each[0], step)
            each[1].step()
            each[1].zero_grad()
    assert_same(parts, twin)


def test_the_first_pass_of_sam_does_not_count():
    model, optimizer, preconditioner = made()
    with preconditioner.paused():
        backward(model)
    steps = [0.05 * p.grad / p.grad.norm() for p in model.parameters()]
    with torch.no_grad():
        torch._foreach_add_(list(model.parameters()), steps)
    optimizer.zero_grad()
    backward(model)
    assert preconditioner.layers[0].capture.count == 64
    with torch.no_grad():
        torch._foreach_sub_(list(model.parameters()), steps)
    optimizer.step()
    assert preconditioner.layers[0].n_refreshes == 1


def test_a_step_whose_every_backward_was_paused_says_so():
    model, optimizer, preconditioner = made()
    with preconditioner.paused():
        backward(model)
    with pytest.raises(RuntimeError, match=r"0 has a gradient .* \(and 1 more .*paused\(\)"):
        optimizer.step()


@pytest.mark.parametrize("name", ["accumulate_gram", "accumulate_token_counts"])
def test_what_reads_whether_it_is_paused_stays_out_of_cuda_graphs(name):
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.dopr, name).default.tags
