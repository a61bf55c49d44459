"""muP in whole runs: no change at the base width, and consistent factors at other widths."""

import math

import pytest
import torch
import transformers

import train
from data.dataset import open_dataset
from data.loader import val_batches
from eval.generate import KVCache, next_logits
from eval.hf import export_hf
from eval.loss import evaluate
from eval.run import load_run
from model import GPT, GPTConfig
from optim.mup import DECAY, EPS, MATRIX_UPDATE, decay_mult, eps_mult, forward_mults, update_mult
from tests.test_train import losses
from tests.tiny import argv, metrics, weights
from trainer.build import make_optimizers
from trainer.checkpoint.read import load_checkpoint
from trainer.config import load_config
from trainer.settings import ConfigError, TrainConfig

WIDER = {"mup": True, "mup_base_width": 8}  # the tiny run is 32 wide: m = 4
OPTIMIZERS = {
    "adamw": {},
    "sgd": {"optimizer": "sgd", "lr": 0.1},
    "signum": {"optimizer": "signum", "lr": 1e-3},
    "muon": {"optimizer": "muon"},
    "muon-unit_rms_norm": {"optimizer": "muon", "adjust_lr": "unit_rms_norm"},
    "muon-original": {"optimizer": "muon", "adjust_lr": "original"},
    "adamuon": {"optimizer": "adamuon"},
}
OPTIMIZERS |= {f"dopr-{name}": {"dopr": True, **each} for name, each in OPTIMIZERS.items()}


@pytest.mark.parametrize("role", ["matrix", "embedding", "head", "gain", "bias"])
@pytest.mark.parametrize("rule", MATRIX_UPDATE)
def test_every_factor_is_exactly_one_at_the_base_width(rule, role):
    assert update_mult(rule, role, 1.0) == 1
    assert {decay_mult(mode, rule, role, 1.0) for mode in ("independent", *DECAY)} == {1}
    assert {eps_mult(name, 1.0) for name in EPS} == {1}
    assert {*forward_mults(1.0, 1.0).values()} == {1}


QUICK = ("adamw", "sgd", "muon-unit_rms_norm", "dopr-adamw", "dopr-muon")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in QUICK else [pytest.mark.slow]) for x in OPTIMIZERS]
)
def test_at_the_base_width_a_run_is_the_standard_one_bit_for_bit(dataset, tmp_path, name):
    changes = OPTIMIZERS[name] | {"max_steps": 10, "wandb": "off"}
    base = {"mup": True, "mup_base_width": 32}
    assert train.main(argv(dataset, tmp_path / "sp", **changes)) == 0
    assert train.main(argv(dataset, tmp_path / "mup", **changes, **base)) == 0
    control = changes | WIDER | {"max_steps": 2, "warmup_steps": 1}
    assert train.main(argv(dataset, tmp_path / "control", **control)) == 0
    assert weights(tmp_path / "mup", 10) == weights(tmp_path / "sp", 10)
    assert losses(tmp_path / "mup") == losses(tmp_path / "sp")
    assert losses(tmp_path / "control")[0] != losses(tmp_path / "sp")[0]


def test_gradients_at_the_base_width_are_the_standard_ones_bit_for_bit():
    sizes = {"vocab_size": 61, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
    x, y = torch.randint(61, (2, 4, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for more in ({}, forward_mults(1.0, 1.0), forward_mults(4.0, 4.0)):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**sizes, **more))
        model(x, y)[1].backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_models_factors_are_those_of_the_table():
    d, d_base = 64, 16  # widths of a head; logits are qᵀk √d_base / d
    found = forward_mults(9.0, d / d_base)
    assert found["attention_mult"] / math.sqrt(d) == math.sqrt(d_base) / d
    assert found["init_mult"] == pytest.approx(1 / 3)
    assert found["logits_mult"] == pytest.approx(1 / 9)


def test_all_hidden_matrices_start_smaller_in_wider_models_and_nothing_else_does():
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "block_size": 128, "n_layer": 2, "n_head": 2, "n_embd": 128}
    model = GPT(GPTConfig(**sizes, tie_weights=False, init_mult=0.25))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            expected = 0.02 * (0.25 if ".h." in name else 1) / (2 if "c_proj" in name else 1)
            assert parameter.std().item() == pytest.approx(expected, rel=0.03)  # 1/√(2·128²)


@pytest.mark.parametrize(("mode", "decay"), [("independent", 0.5), ("constant", 0.5 / 16)])
def test_a_run_trains_with_the_factors_of_its_settings(dataset, tmp_path, mode, decay):
    mup = {"mup": True, "mup_base_width": 2, "mup_base_head_dim": 4, "wd_scaling": mode}  # m = 16
    changes = {"optimizer": "signum", "lr": 0.25, "weight_decay": 0.5 / 0.25, "save_every": 1}
    changes |= {"max_steps": 1, "warmup_steps": 0, "schedule": "constant"}
    assert train.main(argv(dataset, tmp_path, **mup, **changes)) == 0
    config = load_run(tmp_path).model.config
    assert (config.init_mult, config.attention_mult, config.logits_mult) == (1 / 4, 1 / 2, 1 / 16)
    before, after = (
        load_checkpoint(tmp_path / f"checkpoints/step-{step:08d}").model for step in (0, 1)
    )
    for name, eta, share in (("h.1.mlp.c_proj", 0.25 / 16, decay), ("wte", 0.25, 0.5)):
        key = f"transformer.{name}.weight"
        moved = (after[key] - (1 - share) * before[key]).abs().max().item()
        assert moved == pytest.approx(eta, rel=1e-5)  # the update is a sign


@pytest.mark.parametrize(("dopr", "exponent"), [(False, 0), (True, 0.8)])
def test_a_run_passes_dopr_to_the_width_rules(dopr, exponent):
    config = TrainConfig(**WIDER, n_embd=32, n_head=2, optimizer="sgd", lr=0.5, dopr=dopr)
    model = GPT(GPTConfig(vocab_size=61, block_size=16, n_layer=1, n_head=2, n_embd=32))
    (optimizer,) = make_optimizers(config, model, None)
    rates = {group["role"]: group["lr"] for group in optimizer.param_groups}
    assert rates["matrix"] == 0.5 * 4**exponent


@pytest.mark.parametrize("tie_weights", [True, False])
def test_training_evaluation_generation_and_export_agree(dataset, tmp_path, tie_weights):
    out = tmp_path / "run"
    changes = WIDER | {"tie_weights": tie_weights, "lr": 1e-2, "eval_batches": 0}
    assert train.main(argv(dataset, out, **changes)) == 0
    run, data = load_run(out), open_dataset(dataset)
    assert run.model.config.logits_mult == 1 / 4
    batches = val_batches(data, batch_size=4, block_size=16)
    reached = evaluate(run.model, batches, data.tokenizer.token_bytes(), device="cpu")
    assert reached.loss == metrics(out, "val")[-1]["loss"]
    x = torch.arange(12)[None]
    cache = KVCache(run.model, 1)
    steps = torch.cat([next_logits(run.model, x[:, i : i + 1], cache) for i in range(12)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(steps, run.model(x)[0], rtol=0, atol=1e-5)  # order of sums
        export_hf(run.model, run.tokenizer, tmp_path / "hf")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        torch.testing.assert_close(theirs(x).logits, run.model(x)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_run_from_a_hugging_face_folder_starts_with_the_same_function(dataset, tmp_path, bias):
    changes = {"bias": bias, "max_steps": 1, "warmup_steps": 0, "lr": 1e-3, "eval_batches": 0}
    source = WIDER | changes
    assert train.main(argv(dataset, tmp_path / "first", **source)) == 0
    run = load_run(tmp_path / "first")
    export_hf(run.model, run.tokenizer, tmp_path / "hf")
    changes |= {
        "bias": True,
        "init_from": tmp_path / "hf",
    }  # a Hugging Face model always has biases
    found = []
    for mup in ({}, WIDER, {"mup": True, "mup_base_width": 2, "mup_base_head_dim": 4}):
        out = tmp_path / f"second-{len(found)}"
        assert train.main(argv(dataset, out, **changes, **mup)) == 0
        found.append([row["loss"] for row in metrics(out, "val")])
    first = metrics(tmp_path / "first", "val")[-1]["loss"]
    assert [losses[0] for losses in found] == [first] * 3
    assert len({losses[1] for losses in found}) == 3  # the first step differs


@pytest.mark.parametrize("changes", [{"optimizer": "muon", "dopr": True}, {"optimizer": "sgd"}])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(dataset, tmp_path, changes):
    changes = changes | WIDER | {"schedule": "constant", "wd_scaling": "sqrt", "lr": 1e-2}
    assert train.main(argv(dataset, tmp_path / "whole", **changes)) == 0
    for steps in (5, 12):
        assert train.main(argv(dataset, tmp_path / "parts", **changes, max_steps=steps)) == 0
    assert weights(tmp_path / "parts", 12) == weights(tmp_path / "whole", 12)


@pytest.fixture(scope="module")
def wider(dataset, tmp_path_factory):
    """A run of three steps with muP."""
    out = tmp_path_factory.mktemp("wider") / "run"
    assert train.main(argv(dataset, out, **WIDER, max_steps=3)) == 0
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mup": False}, "logits_mult was 0.25, is 1"),
        (WIDER | {"mup_base_width": 16}, "logits_mult was 0.25, is 0.5"),
        (WIDER | {"mup_base_head_dim": 16}, "attention_mult was 0.5, is 1"),
        (WIDER | {"n_head": 4}, "n_head was 2, is 4"),
    ],
)
def test_weights_are_not_resumed_as_another_function(dataset, wider, capsys, changes, message):
    assert train.main(argv(dataset, wider, **changes)) == 1
    assert message in capsys.readouterr().err


def test_the_attention_factor_is_of_the_width_of_a_head():
    sizes = {"n_embd": 64, "n_head": 4, "mup": True, "mup_base_width": 16}
    assert TrainConfig(**sizes).head_mult == 4  # by default, the base has 4 heads of width 4
    assert TrainConfig(**sizes, mup_base_head_dim=16).head_mult == 1  # equal head widths
    assert TrainConfig(**sizes | {"mup": False}).head_mult == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wd_scaling": "constant"}, "wd_scaling=constant: has no effect without mup=true"),
        ({"mup_base_head_dim": 8}, "mup_base_head_dim=8: has no effect without mup=true"),
        ({"mup": True, "mup_base_head_dim": 0}, "mup_base_head_dim=0: must be at least 1"),
        ({"mup": True, "mup_base_width": 0}, "mup_base_width=0: must be at least 1"),
        (
            {"mup": True, "dopr": True, "optimizer": "sgd", "include": "*attn*"},
            "one rule for all matrices",
        ),
        ({"mup": True, "wd_scaling": "linear"}, "wd_scaling='linear': must be one of"),
    ],
)
def test_width_rules_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        load_config([f"--{key}={value}" for key, value in changes.items()])
