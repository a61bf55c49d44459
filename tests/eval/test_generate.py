"""Tests of generation: the key-value cache, generated rows and sampled tokens."""

import pytest
import torch

from eval import generate as generation
from eval.generate import KVCache, generate, linear, next_logits
from eval.sampling import MIN_TEMPERATURE, Sampling, sample_tokens
from tests.tiny_gpt import gpt, tokens

CACHE_ATOL = 1e-5  # fp32 logits of order 1; only the order of summation differs
PROMPTS = [[5, 6, 7, 8, 9], [1], [60, 2, 3]]  # ragged


def uncached(model, row):
    """Return the logits (T, V) of one row, computed as in training."""
    return model(torch.tensor([row]))[0][0]


# -- cache


@pytest.mark.parametrize("tie_weights", [True, False])
def test_cached_logits_equal_uncached_logits(tie_weights):
    model, x = gpt(tie_weights=tie_weights), tokens(3, 16)
    cache = KVCache(model, 3)
    parts = [next_logits(model, part, cache) for part in x.split([5, 1, 1, 7, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(x)[0], rtol=0, atol=CACHE_ATOL)


@pytest.mark.parametrize("batch", [1, 3, 5, 9])  # the products of `linear` have other forms
@pytest.mark.parametrize(
    "changes",
    [
        {"n_embd": 64, "vocab_size": 128},  # multiples of 64
        {"bias": False, "tie_weights": False},
        {"attention_mult": 0.5, "logits_mult": 2.0},
    ],
)
def test_the_cached_forward_is_the_models_own(changes, batch):
    model, x = gpt(**changes).double(), tokens(batch, 16)
    cache = KVCache(model, batch)
    parts = [next_logits(model, part, cache) for part in x.split([7, 1, 2, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(x)[0], rtol=0, atol=1e-12)


def test_a_cached_forward_has_no_dropout():
    model, x = gpt(dropout=0.5), tokens(2, 16)
    expected = model(x)[0]
    logits = next_logits(model.train(), x, KVCache(model, 2))
    torch.testing.assert_close(logits, expected, rtol=0, atol=CACHE_ATOL)


@pytest.mark.parametrize("n", [1, 2, 4, 7, 8, 16, 64])
@pytest.mark.parametrize("N", [61, 192])
def test_linear_is_that_of_torch_for_any_number_of_rows(n, N):
    x, W, b = (torch.randn(shape, dtype=torch.float64) for shape in ((n, 32), (N, 32), (N,)))
    for bias in (None, b):
        expected = torch.nn.functional.linear(x, W, bias)
        torch.testing.assert_close(linear(x, W, bias), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [64, 200])
def test_many_rows_take_the_product_of_torch(n, monkeypatch):
    """Its result is no transposed view, and it is the fastest for many rows."""
    monkeypatch.setattr(torch, "bmm", lambda *_: pytest.fail("by blocks of 64 rows"))
    assert linear(torch.randn(n, 32), torch.randn(192, 32)).is_contiguous()


def test_ragged_rows_keep_their_own_positions():
    model, rows = gpt(), [list(row) for row in PROMPTS]
    cache = KVCache(model, 3)
    padded = torch.tensor([row + [59] * (5 - len(row)) for row in rows])
    logits = next_logits(model, padded, cache, torch.tensor([len(row) for row in rows]))
    for new in ([10, 11, 12], [20, 21, 22], [30, 31, 32]):
        for i, row in enumerate(rows):
            last = logits[i, len(row) - 1 if logits.size(1) > 1 else 0]
            expected = uncached(model, row)[-1]
            torch.testing.assert_close(last, expected, rtol=0, atol=CACHE_ATOL)
            row.append(new[i])
        logits = next_logits(model, torch.tensor(new)[:, None], cache)
    assert cache.lengths.tolist() == [8, 4, 6]


def test_a_row_of_length_zero_does_not_change():
    model, cache = gpt(), KVCache(gpt(), 2)
    next_logits(model, tokens(2, 4), cache)
    next_logits(model, tokens(2, 3, seed=1), cache, torch.tensor([3, 0]))
    logits = next_logits(model, torch.tensor([[7], [8]]), cache)
    row = [*tokens(2, 4)[1].tolist(), 8]
    torch.testing.assert_close(logits[1, 0], uncached(model, row)[-1], rtol=0, atol=CACHE_ATOL)
    assert cache.lengths.tolist() == [8, 5]


def test_writing_past_block_size_raises():
    model = gpt()
    cache = KVCache(model, 2)
    next_logits(model, tokens(2, 15), cache, torch.tensor([15, 3]))
    with pytest.raises(ValueError, match="2 more tokens were given, but only 1 fit"):
        next_logits(model, tokens(2, 2), cache)
    assert next_logits(model, tokens(2, 1), cache).shape == (2, 1, 61)


def test_padding_uses_no_room_in_the_cache():
    model, x = gpt(), tokens(2, 16)
    cache = KVCache(model, 2)
    next_logits(model, x[:, :12], cache, torch.tensor([3, 2]))
    with pytest.raises(ValueError, match="only 13 fit"):
        next_logits(model, x[:, :14], cache)
    logits = next_logits(model, x[:, 3:], cache)
    torch.testing.assert_close(logits[0], model(x[:1])[0][0, 3:], rtol=0, atol=CACHE_ATOL)


def test_the_cache_works_under_autocast():
    model, x = gpt(), tokens(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        cache = KVCache(model, 2)
        parts = [next_logits(model, part, cache) for part in x.split([6, 2], dim=1)]
        expected = model(x)[0]
    error = (torch.cat(parts, 1).float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.02  # bfloat16 has 8 significant bits, so each rounding is off by up to 0.4 %


def test_a_bfloat16_model_generates_from_a_bfloat16_cache():
    model, x = gpt().bfloat16(), tokens(9, 8)
    cache = KVCache(model, 9)
    parts = [next_logits(model, part, cache) for part in x.split([6, 1, 1], dim=1)]
    assert {cache.kv.dtype, *(part.dtype for part in parts)} == {torch.bfloat16}
    expected = gpt()(x)[0]  # in float32
    error = (torch.cat(parts, 1).float() - expected).norm() / expected.norm()
    assert error < 0.03  # see above
    for greedy in (True, False):
        rows = generate(model, PROMPTS, 30, greedy=greedy)  # past block_size
        assert [len(row) for row in rows] == [30] * 3


# -- generation


def greedy_uncached(model, prompt, n):
    row = list(prompt)
    for _ in range(n):
        row.append(int(uncached(model, row)[-1].argmax()))
    return row[len(prompt) :]


def test_greedy_ids_are_equal_with_and_without_cache():
    model = gpt()
    expected = [greedy_uncached(model, prompt, 11) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 11, greedy=True) == expected
    assert len({tuple(row) for row in expected}) == 3  # otherwise the test shows little


def test_the_seed_determines_the_samples():
    def draw(seed):
        return generate(gpt(), PROMPTS, 8, generator=torch.Generator().manual_seed(seed))

    assert draw(1) == draw(1) != draw(2)


def test_batches_that_share_a_generator_give_the_samples_of_one_batch():
    model, whole, parts = gpt(), torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    one_batch = generate(model, PROMPTS, 8, generator=whole)
    split = generate(model, PROMPTS[:1], 8, generator=parts)
    split += generate(model, PROMPTS[1:], 8, generator=parts)
    assert split == one_batch


def test_a_top_k_of_one_is_greedy():
    model = gpt()
    assert generate(model, PROMPTS, 8, top_k=1) == generate(model, PROMPTS, 8, greedy=True)


def test_a_row_ends_with_its_stop_token_and_other_rows_continue():
    model = gpt()
    free = generate(model, PROMPTS, 8, greedy=True)
    stop = next(token for token in free[0] if token not in free[1])
    stopped = generate(model, PROMPTS, 8, greedy=True, stop_token=stop)
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert stopped == cut
    assert len(stopped[0]) < len(stopped[1]) == 8


def test_generation_ends_early_when_every_row_has_stopped(monkeypatch):
    model, steps, read = gpt(), [], generation._read
    first, second = generate(model, [PROMPTS[0], PROMPTS[2]], 11, greedy=True)
    stop = next(token for token in first if token in second)
    monkeypatch.setattr(generation, "_read", lambda *args: steps.append(1) or read(*args))
    rows = generate(model, [PROMPTS[0], PROMPTS[2]], 11, greedy=True, stop_token=stop)
    assert len(rows[0]) != len(rows[1])  # the row that stops first waits for the other
    assert len(steps) == max(map(len, rows)) < 11


def windowed(model, prompt, n):
    """Decode greedily without a cache; a context above block_size keeps its last half."""
    T = model.config.block_size
    context, new = list(prompt), []
    for _ in range(n):
        if len(context) > T:
            context = context[-max(T // 2, 1) :]
        new.append(int(uncached(model, context)[-1].argmax()))
        context.append(new[-1])
    return new


@pytest.mark.parametrize("block_size", [1, 2, 5, 16])
def test_generation_past_block_size_continues_from_the_last_half(block_size):
    model = gpt(block_size=block_size)
    prompts = [[5], [60, 2, 3, 7, 8][:block_size], [*range(16)][:block_size]]
    expected = [windowed(model, prompt, 40) for prompt in prompts]
    assert generate(model, prompts, 40, greedy=True) == expected
    assert generate(model, prompts[1:], 40, greedy=True) == expected[1:]  # whatever the batch


def test_a_stop_token_ends_a_row_past_block_size():
    model, prompt = gpt(), [*range(10)]
    free = windowed(model, prompt, 40)
    stop = free[25]
    assert free.index(stop) > 16 - len(prompt)
    rows = generate(model, [prompt], 40, greedy=True, stop_token=stop)
    assert rows == [free[: free.index(stop) + 1]]


def test_a_temperature_of_zero_is_greedy():
    model = gpt()
    assert generate(model, PROMPTS, 8, temperature=0) == generate(model, PROMPTS, 8, greedy=True)


BAD_CALLS = {
    "prompts \\[1\\] are empty": ([[1], []], 1, {}),
    "prompts \\[0\\] hold ids": ([[61]], 1, {}),
    "no prompts": ([], 1, {}),
    "max_new_tokens=0": ([[1]], 0, {}),
    "temperature=-1.0: must be": ([[1]], 1, {"temperature": -1.0}),
    "temperature=1e-38: must be 0, or": ([[1]], 1, {"temperature": 1e-38}),
    "prompts \\[0\\] have more than block_size=16": ([[1] * 17], 1, {}),
    "top_k=0": ([[1]], 1, {"top_k": 0}),
    "top_p=1.5": ([[1]], 1, {"top_p": 1.5}),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_an_invalid_call_is_an_error(message):
    prompts, max_new_tokens, settings = BAD_CALLS[message]
    with pytest.raises(ValueError, match=message):
        generate(gpt(), prompts, max_new_tokens, **settings)


def test_generation_restores_the_mode_of_every_module():
    model = gpt(dropout=0.5).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    same = [generate(model, PROMPTS, 8, greedy=True) for _ in range(2)]
    assert same[0] == same[1]  # no dropout during generation
    assert [module.training for module in model.modules()] == modes


# -- sampling


def frequencies(logits, n=200_000, **settings):
    """Return the frequency of each token when u is evenly spaced in [0, 1)."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = sample_tokens(logits.expand(n, -1), u, Sampling(**settings))
    return torch.bincount(drawn, minlength=logits.numel()) / n


P = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, P),
        ({"temperature": 0.5}, P**2 / (P**2).sum()),
        ({"top_k": 2}, torch.tensor([0, 4 / 7, 0, 3 / 7, 0])),
        ({"top_k": 99}, P),
        ({"top_p": 0.69}, torch.tensor([0, 4 / 7, 0, 3 / 7, 0])),
        ({"top_p": 0.71}, torch.tensor([0, 8 / 17, 0, 6 / 17, 3 / 17])),
        ({"top_p": 1e-9}, torch.tensor([0, 1.0, 0, 0, 0])),
        ({"top_k": 2, "top_p": 0.5}, torch.tensor([0, 1.0, 0, 0, 0])),  # 4/7 after top_k
        ({"greedy": True}, torch.tensor([0, 1.0, 0, 0, 0])),
    ],
)
def test_token_frequencies_follow_the_settings(settings, expected):
    drawn = frequencies(P.log(), **settings)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=2e-5)  # each boundary is off by 1 / n


@pytest.mark.parametrize("is_transposed", [True, False])
def test_greedy_takes_the_first_of_equal_logits(is_transposed):
    logits = torch.zeros(16, 8192)
    firsts = torch.arange(16) * 500 + 3
    for offset in (0, 1, 190):
        logits[torch.arange(16), firsts + offset] = 1.0
    if is_transposed:
        logits = logits.t().contiguous().t()
    assert sample_tokens(logits, torch.zeros(16), Sampling(greedy=True)).equal(firsts)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("V", [5, 1000, 50257])
def test_extreme_uniform_numbers_draw_no_forbidden_token(u, V):
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(V))
    logits[:, :2] = logits[:, -2:] = -torch.inf
    for how in (Sampling(), Sampling(top_p=0.9), Sampling(top_k=V)):
        token = sample_tokens(logits, torch.tensor([u], dtype=torch.float64), how).item()
        assert 2 <= token < V - 2


def test_the_lowest_temperature_is_greedy():
    lowest = generate(gpt(), PROMPTS, 8, temperature=MIN_TEMPERATURE)
    assert lowest == generate(gpt(), PROMPTS, 8, greedy=True)
