"""Test that the validation loss is an exact sum, however tokens are batched."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from eval.loss import evaluate
from model import GPT, GPTConfig

V = 61
END_OF_TEXT = 0
BYTES = np.arange(V, dtype=np.int32) % 7  # 0 for end-of-text
REL = 1e-6  # float32 logits, summed in float64


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=V, block_size=8, n_layer=1, n_head=2, n_embd=16)).eval()


@pytest.fixture(scope="module")
def data():
    """Return rows (x, y) of 8 tokens. In every third row, only some targets are scored."""
    x, y = torch.randint(V, (2, 12, 8), generator=torch.Generator().manual_seed(0))
    y[::3, 5:] = -1
    return x, y


def batches(data, size):
    return list(zip(*(part.split(size) for part in data), strict=True))


@torch.no_grad()
def plain_loop(model, data):
    """Compute (nats, tokens, bytes) one token at a time."""
    nats, n_tokens, n_bytes = 0.0, 0, 0
    for x, y in zip(*data, strict=True):
        logp = log_softmax(model(x[None])[0][0].double(), dim=-1)
        for t in range(len(y)):
            if y[t] != -1:
                nats -= logp[t, y[t]].item()
                n_tokens += 1
                n_bytes += int(BYTES[y[t]])
    return nats, n_tokens, n_bytes


def test_the_loss_equals_a_plain_loop(model, data):
    nats, n_tokens, n_bytes = plain_loop(model, data)
    result = evaluate(model, batches(data, 5), BYTES, device="cpu")
    assert result.n_tokens == n_tokens == 12 * 8 - 4 * 3
    assert result.loss == pytest.approx(nats / n_tokens, rel=REL)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=REL)


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_the_loss_does_not_depend_on_the_batches(model, data, size):
    result = evaluate(model, batches(data, size), BYTES, device="cpu")
    whole = evaluate(model, [data], BYTES, device="cpu")
    assert result.n_tokens == whole.n_tokens
    assert result.loss == pytest.approx(whole.loss, rel=REL)
    assert result.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=REL)


def test_a_token_that_is_not_scored_does_not_count(model, data):
    x, y = data
    shuffled = x.clone()
    shuffled[::3, 6:] = 0  # no scored target follows these tokens
    first, second = (evaluate(model, [(z, y)], BYTES, device="cpu") for z in (x, shuffled))
    assert first == second


def test_end_of_text_is_scored_and_has_no_bytes(model, data):
    x, _ = data
    result = evaluate(model, [(x, torch.full_like(x, END_OF_TEXT))], BYTES, device="cpu")
    assert result.n_tokens == 96
    assert math.isnan(result.bits_per_byte)


def test_the_model_is_evaluated_without_dropout_and_keeps_its_mode(data):
    torch.manual_seed(0)
    shape = {"vocab_size": V, "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(**shape, dropout=0.5)).train()
    results = [evaluate(model, [data], BYTES, device="cpu") for _ in range(2)]
    assert results[0] == results[1]
    assert model.training


def test_autocast_is_entered_for_every_batch(model, data):
    exact = evaluate(model, batches(data, 4), BYTES, device="cpu")
    autocast = torch.autocast("cpu", torch.bfloat16)
    rounded = evaluate(model, batches(data, 4), BYTES, device="cpu", autocast=autocast)
    assert rounded.loss != exact.loss
    assert rounded.loss == pytest.approx(exact.loss, rel=1e-2)  # bfloat16 has 8 significant bits


def test_a_stop_gives_no_loss_of_a_part(model, data):
    asked = iter([False, False, True])
    stopped = evaluate(
        model, batches(data, 1), BYTES, device="cpu", should_stop=lambda: next(asked)
    )
    assert stopped is None


@pytest.mark.parametrize("nothing", [[], [(torch.zeros(1, 4).long(), torch.full((1, 4), -1))]])
def test_nothing_to_score_is_an_error(model, nothing):
    with pytest.raises(ValueError, match="no scored target"):
        evaluate(model, nothing, BYTES, device="cpu")
