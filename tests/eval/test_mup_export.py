"""Test that a standard GPT with a muP model's folded weights computes the same."""

import pytest
import torch

from eval.generate import generate
from eval.mup_export import folded_weights, unfolded_weights
from eval.rollout.tasks import parse_task
from eval.rollout.ttf import grade_model
from model import GPT, GPTConfig
from optim.mup import forward_mults

SIZES = {"vocab_size": 61, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
X = torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(0))


def mup_model(m: float, **changes) -> GPT:
    """Build a muP model in which every weight and bias matters, and attention is not uniform."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES, **changes, **forward_mults(m, m)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) / 5
            larger = 40 if "c_attn" in name else 5  # so that attention is far from uniform
            parameter.add_(noise) if parameter.dim() == 1 else parameter.mul_(larger)
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


@pytest.mark.parametrize("bias", [True, False])
def test_unfolding_is_the_way_back(bias):
    ours = mup_model(4.0, bias=bias)
    found = unfolded_weights(folded_weights(ours), ours.config)
    assert found.keys() == ours.state_dict().keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in ours.state_dict().items())


def test_generation_by_its_cache_draws_the_standard_models_tokens():
    ours, plain = mup_model(4.0), GPT(GPTConfig(**SIZES)).eval()
    plain.load_state_dict(folded_weights(ours))
    for prompts in ([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4]]):  # even rows, ragged rows
        drawn = [
            generate(model, prompts, 12, generator=torch.Generator().manual_seed(0))
            for model in (ours, plain)
        ]
        assert drawn[0] == drawn[1]
        greedy = torch.tensor([*prompts[-1], *generate(ours, prompts[-1:], 12, greedy=True)[0]])
        expected = ours(greedy[None])[0].argmax(-1)[0]  # without a cache
        assert greedy[len(prompts[-1]) :].tolist() == expected[len(prompts[-1]) - 1 : -1].tolist()


def test_rollouts_are_graded_as_those_of_the_standard_model():
    task = parse_task("task:pdfa,states=4,alphabet=3,horizon=8")
    sizes = SIZES | {"vocab_size": task.open().tokenizer.n_vocab, "block_size": task.context_tokens}
    torch.manual_seed(0)
    ours, plain = GPT(GPTConfig(**sizes, **forward_mults(4.0, 4.0))), GPT(GPTConfig(**sizes))
    without = GPT(GPTConfig(**sizes))
    plain.load_state_dict(folded_weights(ours))
    without.load_state_dict(ours.state_dict())
    found = [grade_model(task, model, n=8, seed=0).means() for model in (ours, plain, without)]
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by torch while it compiles
@torch.no_grad()
def test_the_compiled_model_has_the_same_logits():
    ours = mup_model(4.0)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(X)[0], ours(X)[0], rtol=0, atol=1e-5
    )  # another order of summation
