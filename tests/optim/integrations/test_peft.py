"""LoRA adapters of peft are covered, and their gradients are preconditioned exactly."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from optim import ActivationPreconditioner
from tests.optim.integrations.tiny import examples, gpt2
from tests.optim.models import covariance, oracle, recorded, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
GAMMA = 0.1


@pytest.fixture
def adapted():
    """A GPT-2 with LoRA on its attention, whose two matrices are not zero."""
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.0)
    model = peft.get_peft_model(gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), config)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param)
    return model


def test_the_two_matrices_of_an_adapter_are_covered_and_the_frozen_ones_listed(adapted):
    rows = ActivationPreconditioner(adapted, gamma=GAMMA).report()
    covered = [row["name"] for row in rows if row["covered"]]
    layer = "transformer.h.0.attn.c_attn"
    assert len(covered) == 2
    for name, matrix in zip(covered, "AB", strict=True):
        assert name.endswith(f"{layer}.lora_{matrix}.default.weight")
    frozen = {row["name"]: row["reason"] for row in rows if not row["covered"]}
    (reason,) = (why for name, why in frozen.items() if name.endswith(f"{layer}.base_layer.weight"))
    assert reason == "frozen"


def test_the_gradient_of_an_adapter_is_that_of_a_dense_oracle(adapted):
    adapter = adapted.get_submodule("base_model.model.transformer.h.0.attn.c_attn.lora_A.default")
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.0)
    ActivationPreconditioner(adapted, gamma=GAMMA, count_masked=True).attach(optimizer)
    tokens = torch.stack([each["input_ids"] for each in examples(4)])
    with recorded(adapter) as (inputs,):
        adapted(input_ids=tokens, labels=tokens).loss.backward()
    G = adapter.weight.grad.clone()
    optimizer.step()
    expected = oracle(G, covariance(*inputs), GAMMA)
    assert relative_error(adapter.weight.grad, expected) < 1e-5
