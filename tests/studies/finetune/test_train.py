"""Test the fine-tuning: the trained weights, the saved folder, and the tokens that DoPr uses."""

import json
from dataclasses import replace
from itertools import product

import peft
import pytest
import torch
import transformers

from optim import ActivationPreconditioner
from studies.finetune import train
from studies.finetune.models import load, replace_conv1d
from studies.finetune.questions import answer_loss, batch_of
from studies.finetune.train import DivergedError, Settings, dopr_settings, finetune
from tests.optim.models import covariance, oracle, relative_error
from tests.studies.finetune.tiny import (
    MODELS,
    QUESTIONS,
    examples,
    folder_of,
    gpt2,
    llama,
    logits,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
FAST = dopr_settings("fast", 0.1)


def weights(model):
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def write(path, questions=QUESTIONS):
    path.write_text("".join(json.dumps(each._asdict()) + "\n" for each in questions))
    return path


def command(folder, data, out, *options):
    train.main([*("--model", str(folder), "--data", str(data), "--out", str(out)), *options])


QUICK = {("gpt2", "adamw"), ("llama", "muon"), ("gpt2", "sgd"), ("llama", "signum")}
QUICK |= {("gpt2", "adamuon")}  # each optimizer on one of the models


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
        for case in product(MODELS, ["adamw", "muon", "sgd", "signum", "adamuon"])
    ],
)
def test_every_optimizer_with_dopr_lowers_the_loss(kind, optimizer):
    lr = {"sgd": 1e-2, "signum": 2e-3}.get(optimizer, 1e-2)
    settings = Settings(lr, 12, optimizer, dopr=FAST, batch_size=3)
    _, losses = finetune(MODELS[kind](), examples(), settings, pad_id=1)
    assert losses[-1] < 0.9 * losses[0]


def test_training_is_a_function_of_the_seed():
    settings = [Settings(1e-2, 4, dopr=FAST, lora_rank=2, batch_size=2, seed=s) for s in (0, 0, 1)]
    first, again, other = (weights(finetune(llama(), examples(), s, 1)[0]) for s in settings)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_micro_batches_and_padding_do_not_change_a_step():
    """DoPr's M and the loss are those of the whole batch."""
    found = []
    for size, pad_id in ((None, 1), (1, 7), (2, 3)):
        settings = Settings(0.1, 2, "sgd", "", dopr_settings("exact", 0.1), None, 3, size)
        found.append(finetune(gpt2(), examples(), settings, pad_id))
    for model, losses in found[1:]:
        assert losses == pytest.approx(found[0][1], rel=1e-5)
        for name, weight in weights(model).items():
            torch.testing.assert_close(weight, weights(found[0][0])[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_the_covariance_is_over_the_tokens_that_answers_depend_on(kind):
    """M is the dense oracle over the tokens whose output has a gradient.

    In the last MLP these are the tokens that predict the answers' tokens, alone. In the first MLP
    they are all tokens on which later ones depend, so padding and the end of text do not count.
    """
    model, batch = MODELS[kind](), batch_of(examples(), pad_id=1)
    replace_conv1d(model)
    name = {"gpt2": "transformer.h.{}.mlp.c_fc", "llama": "model.layers.{}.mlp.up_proj"}[kind]
    layers = [model.get_submodule(name.format(i)) for i in (0, 1)]
    predicting = torch.zeros_like(batch.labels, dtype=torch.bool)
    predicting[:, :-1] = batch.labels[:, 1:] != -100
    before_end = torch.zeros_like(predicting)
    before_end[:, :-1] = batch.mask[:, 1:].bool()
    kept = (before_end, predicting)
    inputs = []
    hooks = [
        each.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
        for each in layers
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    answer_loss(model, batch).backward()
    G = [layer.weight.grad.clone() for layer in layers]
    optimizer.step()
    for layer, gradient, z, rows in zip(layers, G, inputs, kept, strict=True):
        expected = oracle(gradient, covariance(z[rows]), 0.1)
        assert relative_error(layer.weight.grad, expected) < 1e-4
    for hook in hooks:
        hook.remove()
    preconditioner.detach()


def test_lora_trains_the_adapters_alone():
    model = llama()
    before = weights(model)
    adapted, losses = finetune(model, examples(), Settings(2e-2, 8, dopr=FAST, lora_rank=2), 1)
    after = weights(adapted)
    frozen = {name.replace(".base_layer", ""): each for name, each in after.items()}
    for name, weight in before.items():
        assert torch.equal(frozen[f"base_model.model.{name}"], weight)
    trained = [name for name, each in adapted.named_parameters() if each.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", MODELS)
def test_the_saved_folder_has_the_same_logits(kind, tmp_path, capsys):
    folder, data = folder_of(kind, tmp_path / "base"), write(tmp_path / "data.jsonl")
    options = ["--lr=1e-2", "--steps=3", "--batch_size=2", "--optimizer=muon", "--dopr=fast"]
    command(folder, data, tmp_path / "out", *options)
    assert "DoPr covers" in capsys.readouterr().out
    settings = Settings(1e-2, 3, "muon", dopr=FAST, batch_size=2)
    expected, _ = finetune(load(folder)[0], examples(), settings, 1)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(found), logits(expected))
    assert (logits(found) - logits(MODELS[kind]())).abs().max() > 0.01
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("2+3")["input_ids"]


@pytest.mark.parametrize("kind", MODELS)
def test_saved_adapters_load_on_their_model(kind, tmp_path, capsys):
    folder, data = folder_of(kind, tmp_path / "base"), write(tmp_path / "data.jsonl")
    options = ["--lr=1e-2", "--steps=3", "--batch_size=2", "--dopr=exact", "--lora_rank=2"]
    command(folder, data, tmp_path / "out", *options)
    shown = capsys.readouterr().out
    assert "lora_A" in shown or "frozen" in shown
    settings = Settings(1e-2, 3, dopr=dopr_settings("exact", 0.1), lora_rank=2, batch_size=2)
    expected, _ = finetune(load(folder)[0], examples(), settings, 1)
    by_peft = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    for found in (load(tmp_path / "out", with_adapters=True)[0], by_peft):
        torch.testing.assert_close(logits(found), logits(expected))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_class_of_another_package_takes_its_arguments(tmp_path):
    folder, data = folder_of("gpt2", tmp_path / "base"), write(tmp_path / "data.jsonl")
    options = ["--lr=1e-2", "--steps=3", "--batch_size=2", "--optimizer=schedulefreeadamw"]
    args = "betas=(0.5,0.9)"
    command(folder, data, tmp_path / "out", *options, f"--optimizer_args={args}")
    settings = Settings(1e-2, 3, "schedulefreeadamw", args, batch_size=2)
    others = replace(settings, optimizer_args="")
    found, other = (
        finetune(load(folder)[0], examples(), each, 1)[0] for each in (settings, others)
    )
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(saved), logits(found))
    assert (logits(saved) - logits(other)).abs().max() > 1e-5


def test_replacing_conv1d_does_not_change_the_logits():
    model, expected = gpt2(), logits(gpt2())
    replace_conv1d(model)
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr=1e-3", "--steps=0"], "--steps=0: must be at least 1"),
        (["--lr=1e-3", "--dopr=fast", "--gamma=-1"], "gamma"),
        (["--lr=1e-3", "--gamma=0.01"], "no effect without DoPr; add --dopr=fast"),
        (["--lr=1e-3", "--fresh_mean"], "no effect without DoPr; add --dopr=fast"),
        (["--lr=1e-3", "--data=missing.jsonl"], "missing.jsonl: cannot be read"),
        (["--lr=1e-3", "--answer_key=result"], "result: Field required"),
        (["--lr=1e-3", "--model=no_model"], "no_model has no config.json"),
        (["--lr=1e12", "--optimizer=sgd", "--steps=30"], "the loss is not finite"),
        (["--lr=1e-3", "--optimizer=adamuom"], "adamuom"),
        (["--lr=1e-3", "--optimizer=lion", "--optimizer_args=beta=1"], "beta"),
        (["--lr=1e-3", "--optimizer_args=betas=(0.9,0.9)"], "optimizer_args"),
    ],
)
def test_wrong_input_raises_one_clear_error(tmp_path, capsys, options, message):
    folder, data = folder_of("gpt2", tmp_path / "base"), write(tmp_path / "data.jsonl")
    with pytest.raises(SystemExit):
        command(folder, data, tmp_path / "out", *options)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_a_loss_that_is_not_finite_raises():
    with pytest.raises(DivergedError, match="not finite"):
        finetune(gpt2(), examples(), Settings(1e12, 30, "sgd"), 1)
