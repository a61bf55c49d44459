"""kernels/gram.py against the dense float64 sum, and its custom operator under torch.compile."""

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from optim.kernels.gram import accumulate_gram, gram_

RUNS, PAUSED = torch.tensor(False), torch.tensor(True)


def gram(z, blocks=1, **sampling):
    """Return S (blocks, d/blocks, d/blocks) of z and the number of tokens."""
    b = z.shape[-1] // blocks
    S = torch.zeros(blocks, b, b, dtype=torch.promote_types(z.dtype, torch.float32))
    return S, gram_(S, z, **sampling)


def dense_gram(rows, blocks=1):
    """Return the diagonal blocks of rowsᵀ rows in float64, for rows (n, d)."""
    full = rows.double().mT @ rows.double()
    b = full.shape[0] // blocks
    return torch.stack([full[k * b : (k + 1) * b, k * b : (k + 1) * b] for k in range(blocks)])


def sampled_positions(T, stride, offset):
    """Return the sampled positions (B, T) as 0 or 1; the gram of one-hot inputs is a histogram."""
    B = 5
    z = torch.eye(B * T).reshape(B, T, B * T)
    S, n = gram(z, stride=stride, offset=offset)
    counts = S[0].diagonal()
    assert counts.sum() == n
    assert counts.max() <= 1
    return counts.reshape(B, T)


@settings(max_examples=40)
@given(
    B=st.integers(1, 4),
    T=st.integers(1, 13),
    b=st.integers(1, 9),
    blocks=st.integers(1, 4),
    stride=st.integers(1, 15),
    offset=st.integers(0, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_gram_equals_the_dense_float64_sum_over_the_sampled_rows(
    B, T, b, blocks, stride, offset, dtype
):
    z = torch.randn(B, T, b * blocks, generator=torch.Generator().manual_seed(T)).to(dtype)
    S, n = gram(z, blocks=blocks, stride=stride, offset=offset)
    taken = [(i, (i + offset + j) % T) for i in range(B) for j in range(0, T, stride)]
    rows = torch.stack([z[i, t] for i, t in taken])
    assert n == len(taken)
    assert S.shape == (blocks, b, b)
    # Products of bf16 numbers are exact in fp32; only the sum of at most 52 terms is rounded.
    torch.testing.assert_close(S.double(), dense_gram(rows, blocks), atol=2e-5, rtol=1e-5)
    assert torch.equal(S, S.mT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gram_is_fp32_and_exactly_symmetric_whatever_the_input_dtype(dtype):
    S, _ = gram(torch.randn(300, 48).to(dtype), blocks=3)
    assert S.dtype == torch.float32
    assert torch.equal(S, S.mT)


def test_float64_input_stays_float64():
    z = torch.randn(20, 6, dtype=torch.float64)
    torch.testing.assert_close(gram(z)[0], dense_gram(z), rtol=1e-13, atol=1e-13)


def test_autocast_does_not_lower_the_precision():
    z = torch.randn(64, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gram(z)[0]
    assert torch.equal(inside, gram(z)[0])


def test_integer_valued_inputs_give_the_exact_sum():
    z = torch.randint(-8, 9, (2, 50, 24))
    S, n = gram(z.bfloat16(), blocks=2)
    assert n == 100
    assert torch.equal(S.double(), dense_gram(z.reshape(-1, 24), 2))


def test_blocks_are_the_diagonal_blocks_of_the_full_gram():
    z = torch.randint(-8, 9, (40, 12)).float()
    full, parts = gram(z)[0][0], gram(z, blocks=4)[0]
    assert all(torch.equal(parts[k], full[3 * k : 3 * k + 3, 3 * k : 3 * k + 3]) for k in range(4))


def test_stride_one_is_all_tokens_in_any_shape():
    z = torch.randint(-8, 9, (4, 10, 6)).float()
    assert torch.equal(gram(z, stride=1, offset=3)[0], gram(z.reshape(-1, 6))[0])


def test_a_stride_that_divides_the_sequence_length_reaches_every_position_in_one_call():
    assert (sampled_positions(T=12, stride=4, offset=0).sum(0) > 0).all()


@pytest.mark.parametrize(("T", "stride"), [(12, 4), (13, 4), (7, 7), (5, 9)])
def test_every_position_is_sampled_equally_often_as_the_offset_turns(T, stride):
    total = sum(sampled_positions(T, stride, offset) for offset in range(T))
    assert (total == -(-T // stride)).all()


def test_an_offset_tensor_gives_what_the_integer_gives():
    z = torch.randn(3, 8, 5)
    for k in range(9):
        as_tensor = gram(z, stride=4, offset=torch.tensor(k))[0]
        assert torch.equal(as_tensor, gram(z, stride=4, offset=k)[0])


@pytest.mark.parametrize("shape", [(0, 6), (0, 8, 6), (3, 0, 6)])
@pytest.mark.parametrize("stride", [1, 4])
def test_no_tokens_give_zeros_and_a_zero_count(shape, stride):
    S, n = gram(torch.empty(shape), blocks=2, stride=stride)
    assert n == 0
    assert torch.equal(S, torch.zeros(2, 3, 3))


def test_the_mean_of_noise_is_the_identity_with_and_without_sampling():
    z = torch.randn(16, 512, 8, generator=torch.Generator().manual_seed(0))
    for stride in (1, 4):
        S, n = gram(z, stride=stride)
        torch.testing.assert_close(S[0] / n, torch.eye(8), atol=5 / n**0.5, rtol=0)


@pytest.mark.parametrize(("beta", "alpha"), [(0.9, 0.1), (1.0, 0.5), (0.0, 1.0)])
def test_it_is_beta_s_plus_alpha_times_the_sum(beta, alpha):
    z, S = torch.randn(30, 12), gram(torch.randn(30, 12), blocks=2)[0]
    before = S.clone()
    n = gram_(S, z, beta=beta, alpha=alpha)
    torch.testing.assert_close(S, beta * before + alpha * gram(z, blocks=2)[0])
    assert n == 30
    assert torch.equal(S, S.mT)


@pytest.mark.parametrize("stride", [1, 3])
def test_column_sums_grow_by_the_sum_over_the_sampled_rows(stride):
    z, sums = torch.randn(4, 7, 6), torch.ones(6)
    S = torch.zeros(2, 3, 3)
    one_hot = torch.eye(28).reshape(4, 7, 28)
    weights, _ = gram(one_hot, stride=stride, offset=2)  # its diagonal marks the sampled rows
    gram_(S, z, stride=stride, offset=2, column_sums=sums)
    expected = 1 + weights[0].diagonal() @ z.reshape(28, 6)
    torch.testing.assert_close(sums, expected)
    assert torch.equal(S, gram(z, blocks=2, stride=stride, offset=2)[0])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: gram_(torch.zeros(3, 3, 3), torch.ones(4, 10)), "expected S of shape"),
        (lambda: gram_(torch.ones(2, 3, 3), torch.ones(5, 4)), "expected S of shape"),
        (lambda: gram_(torch.ones(1, 4, 4), torch.ones(5, 4), stride=0), "stride=0"),
        (lambda: gram_(torch.ones(1, 4, 4), torch.ones(4)), "expected a floating"),
        (lambda: gram_(torch.ones(1, 4, 4).bfloat16(), torch.ones(9, 4)), "S is torch.bfloat16"),
        (lambda: gram_(torch.ones(1, 4, 4), torch.ones(9, 4).long()), "expected a floating"),
        (
            lambda: gram_(torch.ones(1, 4, 4), torch.ones(9, 4, device="meta")),
            "expected S and z on one device",
        ),
        (
            lambda: gram_(torch.ones(1, 4, 4), torch.ones(9, 4), column_sums=torch.ones(5)),
            r"expected column_sums of shape \(4,\)",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()


class CapturingLinear(torch.autograd.Function):
    """z @ Wᵀ with a backward that adds z to a gram, as the preconditioner captures a layer."""

    @staticmethod
    def forward(ctx, z, W, S, count, offset):
        ctx.save_for_backward(z, W, offset)
        ctx.sums = S, count
        return z @ W.mT

    @staticmethod
    def backward(ctx, grad):
        z, W, offset = ctx.saved_tensors
        accumulate_gram(*ctx.sums, z, offset, RUNS, 2)
        return grad @ W, grad.flatten(0, -2).mT @ z.flatten(0, -2), None, None, None


def layer(z, W, S, count, offset):
    return CapturingLinear.apply(z, W, S, count, offset)


def captured(forward, z, W, offset):
    """Return S, count and the gradient of W after one forward and backward."""
    W = W.clone().requires_grad_()
    S, count = torch.zeros(2, 4, 4), torch.zeros((), dtype=torch.int64)
    forward(z, W, S, count, torch.tensor(offset)).square().sum().backward()
    return S, count, W.grad


# Dynamo instantiates the Function class to trace it, for which torch emits a warning.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_operator_in_a_compiled_backward_equals_eager_and_does_not_recompile():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    z, W = torch.randn(3, 6, 8), torch.randn(5, 8)
    for offset in range(3):
        S, count, grad = captured(compiled, z, W, offset)
        assert torch.equal(S, gram(z, blocks=2, stride=2, offset=offset)[0])
        assert count == 9
        torch.testing.assert_close(grad, captured(layer, z, W, offset)[2])
    assert counter.frame_count == 1


def test_gram_itself_compiles_to_one_graph_for_every_offset():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(gram, fullgraph=True, backend=counter)
    z = torch.randn(3, 8, 6)
    for k in range(3):
        S, n = compiled(z, blocks=2, stride=4, offset=torch.tensor(k))
        assert n == 6
        assert torch.equal(S, gram(z, blocks=2, stride=4, offset=k)[0])
    assert counter.frame_count == 1


@pytest.mark.parametrize("is_paused", [RUNS, PAUSED])
@pytest.mark.parametrize("count_dtype", [torch.int64, torch.float32])
def test_the_operator_passes_opcheck(count_dtype, is_paused):
    z, S = torch.randn(3, 6, 8), torch.zeros(2, 4, 4)
    args = (S, torch.zeros((), dtype=count_dtype), z, torch.tensor(1), is_paused, 2)
    torch.library.opcheck(torch.ops.dopr.accumulate_gram.default, args)


def test_the_operator_adds_up_over_calls():
    S, count, offset = torch.zeros(1, 4, 4), torch.zeros(()), torch.tensor(0)
    first, second = torch.randint(-4, 5, (2, 3, 6, 4)).float()
    for z in (first, second):
        accumulate_gram(S, count, z, offset, RUNS, 1)
    assert torch.equal(S, gram(torch.cat([first, second]))[0])
    assert (count, offset) == (36, 6)


def test_a_paused_operator_changes_nothing_not_even_by_what_is_not_finite():
    S, count, offset = torch.ones(1, 4, 4), torch.tensor(7), torch.tensor(3)
    accumulate_gram(S, count, torch.full((6, 4), torch.nan), offset, PAUSED, 1)
    assert torch.equal(S, torch.ones(1, 4, 4))
    assert (count, offset) == (7, 3)
