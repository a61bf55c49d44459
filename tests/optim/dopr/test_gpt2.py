"""Hugging Face's GPT-2, which has Conv1D layers and tied embeddings."""

import pytest
import pytorch_optimizer as others
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from optim import ActivationPreconditioner
from tests.optim.models import covariance, oracle, recorded, relative_error


def tiny_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()  # no dropout, but gradients


def gpt2_loss(model):
    idx = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(1))
    return model(input_ids=idx, labels=idx).loss


@pytest.mark.parametrize("kind", [torch.optim.AdamW, others.Lion])
def test_gpt2_of_hugging_face_trains(kind):
    model = tiny_gpt2()
    optimizer = kind(model.parameters(), lr=1e-2)
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    losses = []
    for _ in range(15):
        losses.append(gpt2_loss(model))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    covered = [layer.name for layer in preconditioner.layers]
    assert covered == [
        f"transformer.h.{i}.{name}"
        for i in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert losses[-1] < 0.8 * losses[0]


def test_gpt2_of_hugging_face_gets_the_oracles_m():
    model = tiny_gpt2()
    preconditioner = ActivationPreconditioner(model, gamma=0.1, count_masked=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    preconditioner.attach(optimizer)
    layers = [layer.covered.module for layer in preconditioner.layers]
    with recorded(*layers) as calls:
        gpt2_loss(model).backward()
    Gs = [layer.weight.grad.clone() for layer in layers]
    optimizer.step()
    for layer, G, inputs in zip(layers, Gs, calls, strict=True):
        expected = oracle(G.mT, covariance(*inputs), 0.1)  # Conv1D stores its weight transposed
        assert relative_error(layer.weight.grad.mT, expected) < 1e-4  # fp32 Σ of 64 tokens, κ = 600
