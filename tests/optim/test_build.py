"""build_optimizers: which optimizer holds which parameters, with which settings; and the table."""

import copy
import io

import pytest
import torch

from model import GPT, GPTConfig
from optim.adamuon import AdaMuon
from optim.build import AUX_LR, OPTIMIZERS, build_optimizers, describe_groups
from optim.muon import Muon
from optim.signum import Signum

NUMBERS = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}
ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
MAIN = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "signum": Signum}
MAIN |= {"muon": Muon, "adamuon": AdaMuon}


def gpt(**changes) -> GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 8}
    return GPT(GPTConfig(**sizes | changes))


def build(model, optimizer: str, **changes) -> list[torch.optim.Optimizer]:
    return build_optimizers(model, optimizer=optimizer, **NUMBERS | ADAM | changes)


def groups_of(optimizers) -> list[dict]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def train(model, optimizers, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        idx = torch.randint(11, (4, 8), generator=generator)
        model(idx, idx)[1].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tie_weights", [True, False])
def test_every_parameter_is_held_exactly_once(name, tie_weights):
    model = gpt(tie_weights=tie_weights)
    held = [p for group in groups_of(build(model, name)) for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["adamw", "sgd", "signum"])
def test_one_optimizer_for_everything(name):
    (optimizer,) = build(gpt(), name)
    assert type(optimizer) is MAIN[name]


@pytest.mark.parametrize("name", ["muon", "adamuon"])
def test_matrix_optimizers_get_the_matrices_and_adamw_the_rest(name):
    main, aux = build(gpt(tie_weights=False), name)
    assert (type(main), type(aux)) == (MAIN[name], torch.optim.AdamW)
    assert {group["role"] for group in main.param_groups} == {"matrix"}
    assert {group["role"] for group in aux.param_groups} == {"embedding", "head", "gain", "bias"}
    assert {group["qkv_blocks"] for group in main.param_groups} == {1, 3}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_2d_parameters_decay(name):
    for group in groups_of(build(gpt(), name)):
        expected = {2: 0.1, 1: 0.0}
        assert {expected[p.ndim] for p in group["params"]} == {group["weight_decay"]}


@pytest.mark.parametrize(("aux_lr", "expected"), [(None, AUX_LR), (0.002, 0.002)])
def test_learning_rates(aux_lr, expected):
    main, aux = build(gpt(), "muon", aux_lr=aux_lr)
    assert {(g["lr"], g["base_lr"]) for g in main.param_groups} == {(0.01, 0.01)}
    assert {(g["lr"], g["base_lr"]) for g in aux.param_groups} == {(expected, expected)}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_learning_rate_of_the_embeddings_changes_no_other(name):
    groups = [g for each in build(gpt(), name) for g in each.param_groups]
    changed = [g for each in build(gpt(), name, embedding_lr=0.3) for g in each.param_groups]
    for old, new in zip(groups, changed, strict=True):
        expected = 0.3 if old["role"] == "embedding" else old["lr"]
        assert (new["lr"], new["base_lr"]) == (expected, expected)
        assert new["param_names"] == old["param_names"]


def test_settings_reach_the_optimizers():
    changes = {"nesterov": False, "ns_coefficients": "quintic", "ns_dtype": "float32"}
    for name, own in (("muon", {"adjust_lr": "unit_rms_norm"}), ("adamuon", {"eps": 1e-6})):
        main, aux = build(gpt(), name, adjust_lr="unit_rms_norm", eps=1e-6, **changes)
        expected = changes | own | {"momentum": 0.9, "lr_mult": 1.0}
        assert all(expected.items() <= group.items() for group in main.param_groups)
        assert (aux.defaults["betas"], aux.defaults["eps"]) == ((0.9, 0.95), 1e-6)
    assert build(gpt(), "sgd")[0].defaults["momentum"] == 0.9
    assert build(gpt(), "signum")[0].defaults["momentum"] == 0.9


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon", "adamuon"])
def test_torchs_optimizers_are_always_fused(name):
    assert build(gpt(), name)[-1].defaults["fused"] is True


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_continues_bit_for_bit_from_a_saved_state(name):
    model = gpt()
    optimizers = build(model, name)
    train(model, optimizers, steps=2)
    stream = io.BytesIO()
    torch.save([optimizer.state_dict() for optimizer in optimizers], stream)
    twin = copy.deepcopy(model)
    stream.seek(0)
    restored = build(twin, name)
    for optimizer, state in zip(restored, torch.load(stream, weights_only=True), strict=True):
        optimizer.load_state_dict(state)
    train(model, optimizers, steps=2, seed=1)
    train(twin, restored, steps=2, seed=1)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )
    assert [g["base_lr"] for g in groups_of(restored)] == [
        g["base_lr"] for g in groups_of(optimizers)
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_few_steps_lower_the_loss(name):
    model, idx = gpt(), torch.arange(8).repeat(4, 1)
    before = model(idx, idx)[1].item()
    optimizers = build(model, name)
    for _ in range(10):
        model(idx, idx)[1].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert model(idx, idx)[1].item() < before - 0.05


def test_the_table_has_one_row_for_all_layers():
    table = describe_groups(build(gpt(n_layer=3), "muon", weight_decay=0.05))
    rows = [line.split() for line in table.splitlines()]
    assert rows[0][:2] == ["parameter", "shape"]
    name = "transformer.h.*.attn.c_attn.weight"
    assert [name, "24", "x", "8", "matrix", "Muon", "0.01", "0.05", "3"] in rows
    assert ["transformer.ln_f.weight", "8", "gain", "AdamW", "0.0006", "0", "1"] in rows
    assert len(rows) == 1 + 16


def test_the_table_accounts_for_every_parameter():
    model = gpt(tie_weights=False)
    rows = describe_groups(build(model, "adamuon")).splitlines()[1:]
    assert sum(int(row.split()[-1]) for row in rows) == len(list(model.parameters()))


def test_the_table_prints_peak_rates_with_the_multiplier():
    optimizers = build(gpt(), "signum")
    for group in groups_of(optimizers):
        group["lr"], group["lr_mult"] = 0.0, 0.5
    assert "  0.005 " in describe_groups(optimizers)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("adamww", {}, "optimizer='adamww': no optimizer has this name; did you mean 'adamw'"),
        ("muon", {"optimizer_args": "beta=1"}, "optimizer_args='beta=1': has no effect on optim"),
        (
            "sgd",
            {"optimizer_roles": "all"},
            "optimizer_roles='all': has no effect on optimizer=sgd",
        ),
        ("adamw", {"aux_lr": 0.1}, "aux_lr=0.1: optimizer='adamw' has no auxiliary AdamW"),
        ("muon", {"momentum": 1.5}, "Muon: momentum=1.5"),
        ("muon", {"adjust_lr": "rms"}, "Muon: adjust_lr='rms'"),
        ("adamw", {"beta2": 1.0}, "beta parameter at index 1: 1.0"),
    ],
)
def test_bad_input_is_named_with_its_value(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build(gpt(), name, **changes)
