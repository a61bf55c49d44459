"""Tests of the model: its settings, initial weights, loss and gradients."""

import copy
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from model import GPT, GPTConfig, aligned_linear, eval_mode, tied_head
from tests.devices import DEVICES
from tests.tiny_gpt import TINY, gpt, tokens

# -- settings


def test_every_problem_of_a_config_is_in_one_error():
    with pytest.raises(ValueError, match="n_layer=0") as error:
        GPTConfig(**TINY | {"n_layer": 0, "n_head": 3, "dropout": 1.0})
    assert "n_embd=32: must be divisible by n_head=3" in str(error.value)
    assert "dropout=1.0" in str(error.value)


def test_a_head_count_of_zero_is_an_error():
    with pytest.raises(ValueError, match="n_head=0: must be at least 1"):
        GPTConfig(**TINY | {"n_head": 0})


def test_more_tokens_than_block_size_are_refused():
    with pytest.raises(ValueError, match="got 17 tokens a row, but block_size is 16"):
        gpt()(tokens(1, 17))


# -- initial state and names


def test_the_initial_loss_is_that_of_a_uniform_distribution():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY | {"vocab_size": 512, "n_embd": 64}))
    x, y = torch.randint(512, (2, 8, 16))
    assert model(x, y)[1].item() == pytest.approx(math.log(512), abs=0.05)


def test_residual_projections_start_smaller_in_deeper_models():
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
def test_weight_names_are_those_of_gpt2(bias):
    names = {n for n in gpt(bias=bias, n_layer=1).state_dict() if n.endswith("weight")}
    block = {"ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"}
    expected = {"wte", "wpe", "ln_f"} | {f"h.0.{name}" for name in block}
    assert names == {f"transformer.{name}.weight" for name in expected}
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
    matrices = 2 * 12 * 32 * 32 + 61 * 32  # transformer blocks, head
    gains = 5 * 32  # of LayerNorms
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
    expected = cross_entropy(torch.cat([logits[0, :4], logits[1]]), torch.cat([y[0, :4], y[1]]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
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


def test_training_memorizes_one_batch():
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch during compilation
def test_forward_compiles_into_one_graph():
    model, x, y = gpt(dropout=0.1).train(False), tokens(2, 16), tokens(2, 16, seed=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert compiled(x, y)[1].item() == pytest.approx(model(x, y)[1].item(), rel=1e-6)


@pytest.mark.parametrize("V", [5, 64, 65, 127])
def test_aligned_linear_has_the_logits_and_gradients_of_linear(V):
    x, W = (torch.randn(n, 16, dtype=torch.float64, requires_grad=True) for n in (7, V))
    aligned, expected = aligned_linear(x, W), torch.nn.functional.linear(x, W)
    assert aligned.stride(0) == -(-V // 64) * 64  # a slice of the columns of a wider product
    torch.testing.assert_close(aligned, expected)
    seed = torch.randn_like(expected)
    grads = (torch.autograd.grad(y, (x, W), seed) for y in (aligned, expected))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("device", DEVICES)
def test_a_tied_head_is_aligned_for_many_tokens_on_a_gpu_only(device):
    W = torch.randn(65, 16, device=device)
    for n, width in ((1023, 65), (1024, 128 if device == "cuda" else 65)):
        x = torch.randn(n, 16, device=device)
        logits = tied_head(x, W)
        assert (logits.shape, logits.stride(0)) == ((n, 65), width)
        torch.testing.assert_close(logits, torch.nn.functional.linear(x, W), rtol=0, atol=1e-2)


def test_eval_mode_restores_modes_after_an_error():
    model, inside = gpt().train(), []
    with pytest.raises(IndexError), eval_mode(model):
        inside.append(model.training) or inside[1]
    assert inside == [False]
    assert model.training
