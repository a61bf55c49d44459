"""GPT-2: the cache changes nothing, sampling does what it says, and the model learns."""

import copy
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from model import GPT, GPTConfig, Sampling, aligned_linear, eval_mode, sample_tokens, tied_head
from tests.devices import DEVICES

TINY = {"vocab_size": 61, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
CACHE_ATOL = 1e-5  # fp32, logits of order 1: other summation order, nothing else
PROMPTS = [[5, 6, 7, 8, 9], [1], [60, 2, 3]]  # ragged


def gpt(seed=0, **changes):
    """A tiny model whose weights are large enough for logits that differ between tokens."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**TINY | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "wte" not in name:
                parameter.mul_(5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def tokens(*shape, seed=0):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))


def uncached(model, row):
    """Logits (T, V) of one row, read as training reads it."""
    return model(torch.tensor([row]))[0][0]


# -- settings


def test_every_problem_of_a_config_is_in_one_error():
    with pytest.raises(ValueError, match="n_layer=0") as error:
        GPTConfig(**TINY | {"n_layer": 0, "n_head": 3, "dropout": 1.0})
    assert "n_embd=32: must be divisible by n_head=3" in str(error.value)
    assert "dropout=1.0" in str(error.value)


def test_a_head_count_of_zero_is_an_error_and_no_crash():
    with pytest.raises(ValueError, match="n_head=0: must be at least 1"):
        GPTConfig(**TINY | {"n_head": 0})


def test_more_tokens_than_block_size_are_refused():
    with pytest.raises(ValueError, match="got 17 tokens a row, but block_size is 16"):
        gpt()(tokens(1, 17))


# -- initial state and names


def test_initial_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY | {"vocab_size": 512, "n_embd": 64}))
    x, y = torch.randint(512, (2, 8, 16))
    assert model(x, y)[1].item() == pytest.approx(math.log(512), abs=0.05)


def test_residual_projections_start_smaller_by_the_depth():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY | {"n_embd": 128, "n_layer": 8}))
    block = model.transformer.h[0]
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)


def test_a_tied_model_has_no_head_of_its_own_and_an_untied_one_has():
    tied, untied = gpt(), gpt(tie_weights=False)
    assert untied.state_dict().keys() - tied.state_dict().keys() == {"lm_head.weight"}
    assert untied.n_parameters() - tied.n_parameters() == 61 * 32
    assert len({t.data_ptr() for t in tied.state_dict().values()}) == len(tied.state_dict())


@pytest.mark.parametrize("bias", [True, False])
def test_names_are_those_of_gpt2(bias):
    names = {n for n in gpt(bias=bias, n_layer=1).state_dict() if n.endswith("weight")}
    block = {"ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"}
    wanted = {"wte", "wpe", "ln_f"} | {f"h.0.{name}" for name in block}
    assert names == {f"transformer.{name}.weight" for name in wanted}
    assert any(n.endswith("bias") for n in gpt(bias=bias).state_dict()) is bias


@pytest.mark.parametrize("tie_weights", [True, False])
def test_a_state_dict_round_trip_keeps_every_logit(tie_weights):
    model, other = (gpt(seed, tie_weights=tie_weights) for seed in (0, 1))
    x = tokens(2, 16)
    assert not torch.equal(model(x)[0], other(x)[0])
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x)[0], other(x)[0])


def test_a_deep_copy_is_equal_and_independent():
    model = gpt()
    twin, x = copy.deepcopy(model), tokens(2, 16)
    before = model(x)[0]
    assert torch.equal(twin(x)[0], before)
    with torch.no_grad():
        twin.transformer.wte.weight.zero_()
    assert torch.equal(model(x)[0], before)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_flops_count_every_matrix_once_and_attention(tie_weights):
    model = gpt(tie_weights=tie_weights, bias=False)
    matrices = 2 * 12 * 32 * 32 + 61 * 32  # blocks, head
    gains = 5 * 32
    assert model.flops_per_token() == 6 * (matrices + gains) + 12 * 2 * 32 * 16


# -- training


def test_a_token_sees_no_later_token():
    model, x = gpt(), tokens(1, 16)
    later = x.clone()
    later[0, 9:] = (later[0, 9:] + 1) % 61
    assert torch.equal(model(x)[0][:, :9], model(later)[0][:, :9])
    assert not torch.equal(model(x)[0][:, 9], model(later)[0][:, 9])


def test_the_loss_is_the_mean_over_scored_targets():
    model, x, y = gpt(), tokens(2, 16), tokens(2, 16, seed=1)
    y[0, 4:] = -1
    logits, loss = model(x, y)
    wanted = cross_entropy(torch.cat([logits[0, :4], logits[1]]), torch.cat([y[0, :4], y[1]]))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert model(x, y, return_logits=False) == (None, loss)


def test_padding_has_no_gradient():
    model, x = gpt(tie_weights=False), tokens(2, 16)
    y = tokens(2, 16, seed=1)
    y[1] = -1
    gradients = []
    for rows in (slice(0, 2), slice(0, 1)):
        model.zero_grad()
        model(x[rows], y[rows])[1].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for with_padding, without in zip(*gradients, strict=True):
        assert torch.allclose(with_padding, without, rtol=1e-4, atol=1e-7)


def test_one_batch_is_learnt_by_heart():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY))
    x, y = tokens(4, 16), tokens(4, 16, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(x, y)[1]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_dropout_acts_in_training_only():
    model, x = gpt(dropout=0.5), tokens(1, 16)
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_forward_compiles_into_one_graph():
    model, x, y = gpt(dropout=0.1).train(False), tokens(2, 16), tokens(2, 16, seed=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert compiled(x, y)[1].item() == pytest.approx(model(x, y)[1].item(), rel=1e-6)


@pytest.mark.parametrize("V", [5, 64, 65, 127])
def test_a_head_over_whole_tiles_has_the_same_logits_and_gradients(V):
    x, W = (torch.randn(n, 16, dtype=torch.float64, requires_grad=True) for n in (7, V))
    found, wanted = aligned_linear(x, W), torch.nn.functional.linear(x, W)
    assert found.stride(0) == -(-V // 64) * 64  # of the wider product, of which these are columns
    torch.testing.assert_close(found, wanted)
    seed = torch.randn_like(wanted)
    grads = (torch.autograd.grad(y, (x, W), seed) for y in (found, wanted))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("device", DEVICES)
def test_a_tied_head_is_wider_for_many_tokens_on_a_gpu_only(device):
    W = torch.randn(65, 16, device=device)
    for n, width in ((1023, 65), (1024, 128 if device == "cuda" else 65)):
        x = torch.randn(n, 16, device=device)
        logits = tied_head(x, W)
        assert (logits.shape, logits.stride(0)) == ((n, 65), width)
        torch.testing.assert_close(logits, torch.nn.functional.linear(x, W), rtol=0, atol=1e-2)


# -- cache


@pytest.mark.parametrize("tie_weights", [True, False])
def test_cached_logits_equal_uncached_logits(tie_weights):
    model, x = gpt(tie_weights=tie_weights), tokens(3, 16)
    cache = model.make_cache(3)
    parts = [model.step(part, cache) for part in x.split([5, 1, 1, 7, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(x)[0], rtol=0, atol=CACHE_ATOL)


def test_ragged_rows_keep_their_own_positions():
    model, rows = gpt(), [list(row) for row in PROMPTS]
    cache = model.make_cache(3)
    padded = torch.tensor([row + [59] * (5 - len(row)) for row in rows])
    logits = model.step(padded, cache, torch.tensor([len(row) for row in rows]))
    for new in ([10, 11, 12], [20, 21, 22], [30, 31, 32]):
        for i, row in enumerate(rows):
            last = logits[i, len(row) - 1 if logits.size(1) > 1 else 0]
            wanted = uncached(model, row)[-1]
            torch.testing.assert_close(last, wanted, rtol=0, atol=CACHE_ATOL)
            row.append(new[i])
        logits = model.step(torch.tensor(new)[:, None], cache)
    assert cache.lengths.tolist() == [8, 4, 6]


def test_a_row_of_length_zero_stays_as_it_is():
    model, cache = gpt(), gpt().make_cache(2)
    model.step(tokens(2, 4), cache)
    model.step(tokens(2, 3, seed=1), cache, torch.tensor([3, 0]))
    logits = model.step(torch.tensor([[7], [8]]), cache)
    row = [*tokens(2, 4)[1].tolist(), 8]
    torch.testing.assert_close(logits[1, 0], uncached(model, row)[-1], rtol=0, atol=CACHE_ATOL)
    assert cache.lengths.tolist() == [8, 5]


def test_writing_past_block_size_raises():
    model = gpt()
    cache = model.make_cache(2)
    model.step(tokens(2, 15), cache, torch.tensor([15, 3]))
    with pytest.raises(ValueError, match="2 more tokens were given, but only 1 fit"):
        model.step(tokens(2, 2), cache)
    assert model.step(tokens(2, 1), cache).shape == (2, 1, 61)


def test_padding_takes_no_room_in_the_cache():
    model, x = gpt(), tokens(2, 16)
    cache = model.make_cache(2)
    model.step(x[:, :12], cache, torch.tensor([3, 2]))
    with pytest.raises(ValueError, match="only 13 fit"):
        model.step(x[:, :14], cache)
    logits = model.step(x[:, 3:], cache)
    torch.testing.assert_close(logits[0], model(x[:1])[0][0, 3:], rtol=0, atol=CACHE_ATOL)


def test_the_cache_works_under_autocast():
    model, x = gpt(), tokens(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.make_cache(2)
        parts = [model.step(part, cache) for part in x.split([6, 2], dim=1)]
        wanted = model(x)[0]
    error = (torch.cat(parts, 1).float() - wanted.float()).norm() / wanted.float().norm()
    assert error < 0.02  # bfloat16 keeps 8 bits: 0.4 % a rounding


# -- generation


def greedy_uncached(model, prompt, n):
    row = list(prompt)
    for _ in range(n):
        row.append(int(uncached(model, row)[-1].argmax()))
    return row[len(prompt) :]


def test_greedy_ids_are_equal_with_and_without_cache():
    model = gpt()
    wanted = [greedy_uncached(model, prompt, 11) for prompt in PROMPTS]
    assert model.generate(PROMPTS, 11, greedy=True) == wanted
    assert len({tuple(row) for row in wanted}) == 3  # else the test would say little


def test_the_same_seed_gives_the_same_samples_and_another_seed_others():
    def draw(seed):
        return gpt().generate(PROMPTS, 8, generator=torch.Generator().manual_seed(seed))

    assert draw(1) == draw(1) != draw(2)


def test_batches_that_share_a_generator_give_the_samples_of_one_batch():
    model, whole, parts = gpt(), torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    raise_on_all_ranks = model.generate(PROMPTS, 8, generator=whole)
    split = model.generate(PROMPTS[:1], 8, generator=parts)
    split += model.generate(PROMPTS[1:], 8, generator=parts)
    assert split == raise_on_all_ranks


def test_a_top_k_of_one_is_greedy():
    model = gpt()
    assert model.generate(PROMPTS, 8, top_k=1) == model.generate(PROMPTS, 8, greedy=True)


def test_a_row_ends_with_its_stop_token_and_the_others_go_on():
    model = gpt()
    free = model.generate(PROMPTS, 8, greedy=True)
    stop = next(token for token in free[0] if token not in free[1])
    stopped = model.generate(PROMPTS, 8, greedy=True, stop_token=stop)
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert stopped == cut
    assert len(stopped[0]) < len(stopped[1]) == 8


def test_generation_ends_early_when_every_row_has_stopped(monkeypatch):
    model, steps, read = gpt(), [], GPT._read
    first, second = model.generate([PROMPTS[0], PROMPTS[2]], 11, greedy=True)
    stop = next(token for token in first if token in second)
    monkeypatch.setattr(model, "_read", lambda *args: steps.append(1) or read(model, *args))
    rows = model.generate([PROMPTS[0], PROMPTS[2]], 11, greedy=True, stop_token=stop)
    assert len(rows[0]) != len(rows[1])  # the first to stop waits for the other
    assert len(steps) == max(map(len, rows)) < 11


def test_generation_past_block_size_says_how_many_tokens_fit():
    assert len(gpt().generate(PROMPTS, 11)[0]) == 11
    with pytest.raises(ValueError, match="5 tokens, so 11 new tokens fit into block_size=16"):
        gpt().generate(PROMPTS, 12)


BAD_CALLS = {
    "prompts \\[1\\] are empty": ([[1], []], 1, {}),
    "prompts \\[0\\] hold ids": ([[61]], 1, {}),
    "no prompts": ([], 1, {}),
    "max_new_tokens=0": ([[1]], 0, {}),
    "temperature=0.0: must be positive": ([[1]], 1, {"temperature": 0.0}),
    "top_k=0": ([[1]], 1, {"top_k": 0}),
    "top_p=1.5": ([[1]], 1, {"top_p": 1.5}),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_a_call_that_means_nothing_is_refused(message):
    prompts, max_new_tokens, settings = BAD_CALLS[message]
    with pytest.raises(ValueError, match=message):
        gpt().generate(prompts, max_new_tokens, **settings)


def test_generation_leaves_every_module_in_its_mode():
    model = gpt(dropout=0.5).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    same = [model.generate(PROMPTS, 8, greedy=True) for _ in range(2)]
    assert same[0] == same[1]  # no dropout meanwhile
    assert [module.training for module in model.modules()] == modes


def test_modes_come_back_after_an_error():
    model, inside = gpt().train(), []
    with pytest.raises(IndexError), eval_mode(model):
        inside.append(model.training) or inside[1]
    assert inside == [False]
    assert model.training


# -- sampling


def frequencies(logits, n=200_000, **settings):
    """How often each token is drawn when u runs evenly through [0, 1)."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = sample_tokens(logits.expand(n, -1), u, Sampling(**settings))
    return torch.bincount(drawn, minlength=logits.numel()) / n


P = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, P),
        ({"temperature": 0.5}, P**2 / (P**2).sum()),
        ({"top_k": 2}, torch.tensor([0, 4 / 7, 0, 3 / 7, 0])),
        ({"top_k": 99}, P),
        ({"top_p": 0.69}, torch.tensor([0, 4 / 7, 0, 3 / 7, 0])),
        ({"top_p": 0.71}, torch.tensor([0, 8 / 17, 0, 6 / 17, 3 / 17])),
        ({"top_p": 1e-9}, torch.tensor([0, 1.0, 0, 0, 0])),
        ({"top_k": 2, "top_p": 0.5}, torch.tensor([0, 1.0, 0, 0, 0])),  # 4/7 of what top_k left
        ({"greedy": True}, torch.tensor([0, 1.0, 0, 0, 0])),
    ],
)
def test_tokens_come_as_often_as_the_settings_say(settings, wanted):
    drawn = frequencies(P.log(), **settings)
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=2e-5)  # 1 / n a boundary


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("V", [5, 1000, 50257])
def test_the_extreme_uniform_numbers_draw_no_forbidden_token(u, V):
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(V))
    logits[:, :2] = logits[:, -2:] = -torch.inf
    for how in (Sampling(), Sampling(top_p=0.9), Sampling(top_k=V)):
        token = sample_tokens(logits, torch.tensor([u], dtype=torch.float64), how).item()
        assert 2 <= token < V - 2
