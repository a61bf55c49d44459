"""A muP model's weights with its factors folded in are a standard model that computes the same."""

import pytest
import torch

from eval.fold import folded_weights
from model import GPT, GPTConfig
from mup import forward_mults

SIZES = {"vocab_size": 61, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
X = torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(0))


def mup_model(m: float, **changes) -> GPT:
    """A model whose every weight and bias has an effect."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES, **changes, **forward_mults(m, m)))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) / 5
            parameter.add_(noise) if parameter.dim() == 1 else parameter.mul_(5)
    return model.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("m", [0.25, 4.0, 3.0])
@torch.no_grad()
def test_the_standard_model_has_the_same_logits(m, tie_weights, bias):
    changes = {"tie_weights": tie_weights, "bias": bias}
    ours, plain = mup_model(m, **changes), GPT(GPTConfig(**SIZES, **changes)).eval()
    before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    plain.load_state_dict(folded_weights(ours))
    if m == 3:  # 1/3 and 1/√3 round
        torch.testing.assert_close(plain(X)[0], ours(X)[0], rtol=0, atol=1e-5)
    else:
        assert torch.equal(plain(X)[0], ours(X)[0])
    assert all(torch.equal(before[key], tensor) for key, tensor in ours.state_dict().items())


@torch.no_grad()
def test_without_folding_the_logits_are_others():
    ours, plain = mup_model(4.0), GPT(GPTConfig(**SIZES)).eval()
    plain.load_state_dict(ours.state_dict())
    assert (plain(X)[0] - ours(X)[0]).abs().max() > 0.1
