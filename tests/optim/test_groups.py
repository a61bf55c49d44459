"""Roles of parameters, and the check that every parameter is in one param group."""

import pytest
import torch
from torch import nn

from model import GPT, GPTConfig
from optim.groups import assign_roles, check_complete

SIZES = {"vocab_size": 11, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 4}


def gpt(**changes) -> GPT:
    return GPT(GPTConfig(**SIZES | changes))


def roles(model: nn.Module) -> dict[str, str]:
    return {row.name: row.role for row in assign_roles(model)}


def test_every_trainable_parameter_has_one_row():
    model = gpt()
    assert [row.name for row in assign_roles(model)] == [n for n, _ in model.named_parameters()]
    assert all(row.param is dict(model.named_parameters())[row.name] for row in assign_roles(model))


def test_roles_of_gpt2():
    found = roles(gpt(tie_weights=False))
    layer = "transformer.h.1."
    assert {found[f"{layer}{m}.weight"] for m in ("attn.c_attn", "mlp.c_proj")} == {"matrix"}
    assert {found[f"transformer.{m}.weight"] for m in ("wte", "wpe")} == {"embedding"}
    assert {found["transformer.ln_f.weight"], found[f"{layer}ln_1.weight"]} == {"gain"}
    assert {found["transformer.ln_f.bias"], found[f"{layer}attn.c_attn.bias"]} == {"bias"}
    assert found["lm_head.weight"] == "head"


def test_a_tied_head_is_the_embedding():
    found = roles(gpt(tie_weights=True))
    assert found["transformer.wte.weight"] == "embedding"
    assert "lm_head.weight" not in found


def test_a_tied_head_that_comes_first_is_the_embedding():
    model = nn.ModuleDict({"lm_head": nn.Linear(4, 11, bias=False), "wte": nn.Embedding(11, 4)})
    model["wte"].weight = model["lm_head"].weight
    assert roles(model) == {"wte.weight": "embedding"}


def test_only_the_fused_qkv_weight_has_three_blocks():
    blocks = {row.name: row.qkv_blocks for row in assign_roles(gpt())}
    assert {name for name, count in blocks.items() if count == 3} == {
        f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)
    }
    assert set(blocks.values()) == {1, 3}


def test_frozen_parameters_have_no_row():
    model = gpt()
    model.transformer.wpe.weight.requires_grad_(False)
    assert "transformer.wpe.weight" not in roles(model)


def test_roles_survive_a_wrapper():
    wrapped = nn.ModuleDict({"module": gpt(tie_weights=False)})
    assert roles(wrapped) == {
        f"module.{name}": role for name, role in roles(gpt(tie_weights=False)).items()
    }


def test_parameters_without_a_role_are_all_named():
    model = nn.ModuleDict({"conv": nn.Conv2d(1, 2, 3), "bilinear": nn.Bilinear(2, 2, 2)})
    with pytest.raises(ValueError, match=r"conv.weight \(2, 1, 3, 3\), bilinear.weight"):
        assign_roles(model)


def test_a_fused_layer_whose_rows_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="c_attn: 4 rows"):
        assign_roles(nn.ModuleDict({"c_attn": nn.Linear(4, 4)}))


def test_complete_groups_pass():
    model = gpt()
    params = list(model.parameters())
    check_complete(model, [{"params": params[:3]}, {"params": params[3:]}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda params: params.pop(0), "in none: transformer.wte.weight"),
        (lambda params: params.append(params[1]), "in several: transformer.wpe.weight"),
        (lambda params: params.append(nn.Parameter(torch.ones(1))), "of the model: 1"),
    ],
)
def test_a_lost_repeated_or_foreign_parameter_is_reported(change, message):
    model = gpt()
    params = list(model.parameters())
    change(params)
    with pytest.raises(ValueError, match=message):
        check_complete(model, [{"params": params}])
