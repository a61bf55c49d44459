"""Test that import and export keep logits and ids, and that errors name their cause."""

import json
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import train
from data.tokenizer import byte_tokenizer
from eval.generate import generate
from eval.hf import export_hf, load_hf, main
from eval.run import load_run
from model import GPT, GPTConfig
from tests.tiny import argv

ATOL = 1e-4  # float32 logits of order 1; only the order of summation differs


def gpt(vocab_size=257, **changes):
    """Build a tiny model in which every weight and every bias matters."""
    torch.manual_seed(0)
    shape = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(vocab_size=vocab_size, **shape | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) / 5
            parameter.add_(noise) if parameter.dim() == 1 else parameter.mul_(5)
            assert parameter.std() > 0, name
    return model.eval()


def hf_gpt2(folder, **changes):
    """Save a random GPT-2 of Hugging Face to `folder` and return it."""
    torch.manual_seed(0)
    shape = {"vocab_size": 257, "n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
    end = {"bos_token_id": 256, "eos_token_id": 256}
    config = transformers.GPT2Config(**shape, **end, **changes)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    model.save_pretrained(folder)
    return model


X = torch.randint(257, (3, 16), generator=torch.Generator().manual_seed(0))


# -- weights


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_an_exported_model_has_our_logits_and_comes_back(tmp_path, tie_weights, bias):
    model = gpt(tie_weights=tie_weights, bias=bias)
    export_hf(model, byte_tokenizer(), tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values())  # nothing missing, unexpected or mismatched
    with torch.no_grad():
        torch.testing.assert_close(theirs(X).logits, model(X)[0], rtol=0, atol=ATOL)
        back = load_hf(tmp_path).eval()
        torch.testing.assert_close(back(X)[0], model(X)[0], rtol=0, atol=ATOL)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_an_imported_model_has_hugging_faces_logits(tmp_path, tie_weights):
    theirs = hf_gpt2(tmp_path, tie_word_embeddings=tie_weights)
    ours = load_hf(tmp_path)
    assert ours.config.tie_weights is tie_weights
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(X)[0], theirs(X).logits, rtol=0, atol=ATOL)


def test_names_without_prefix_and_mask_buffers_are_understood(tmp_path):
    theirs = hf_gpt2(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {key.removeprefix("transformer."): value for key, value in weights.items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(
            load_hf(tmp_path).eval()(X)[0], theirs(X).logits, rtol=0, atol=ATOL
        )


def test_half_precision_weights_are_read_as_float32(tmp_path):
    hf_gpt2(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, tmp_path / "model.safetensors")
    assert {p.dtype for p in load_hf(tmp_path).parameters()} == {torch.float32}


def test_hugging_face_generates_what_we_generate(tmp_path):
    model, prompt = gpt(), [5, 6, 7]
    export_hf(model, byte_tokenizer(), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    x = torch.tensor([prompt])
    greedy = theirs.generate(
        x, attention_mask=torch.ones_like(x), do_sample=False, max_new_tokens=12
    )
    assert greedy[0, 3:].tolist() == generate(model, [prompt], 12, greedy=True, stop_token=256)[0]


# -- errors


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "relu"),
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 33),
        ("model_type", "gpt_neo"),
    ],
)
def test_another_architecture_is_refused_by_its_setting(tmp_path, key, value):
    hf_gpt2(tmp_path)
    edit_config(tmp_path, **{key: value})
    with pytest.raises(
        ValueError, match=rf"config.json: {key}={value!r} is not supported; must be"
    ):
        load_hf(tmp_path)


def test_missing_unexpected_and_misshapen_weights_are_all_listed(tmp_path):
    hf_gpt2(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.ln_f.bias"]
    weights["transformer.h.9.extra"] = torch.zeros(1)
    weights["transformer.wpe.weight"] = torch.zeros(8, 32)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing transformer\.ln_f\.bias") as error:
        load_hf(tmp_path)
    assert "unexpected transformer.h.9.extra" in str(error.value)
    assert "transformer.wpe.weight is (8, 32), config.json says (16, 32)" in str(error.value)


def test_a_folder_without_the_files_says_how_to_get_them(tmp_path):
    with pytest.raises(ValueError, match=r"config.json: no such file; .*save_pretrained"):
        load_hf(tmp_path)
    hf_gpt2(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(ValueError, match="damaged"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="max_shard_size"):
        load_hf(tmp_path)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"vocab_size": "many"}'])
def test_a_file_that_is_no_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="not the configuration of a GPT-2"):
        load_hf(tmp_path)


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="the model has 100 ids, but tokenizer 'byte' has 257"):
        export_hf(gpt(vocab_size=100), byte_tokenizer(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_extra_package_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install"):
        export_hf(gpt(), byte_tokenizer(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- command


def test_the_command_exports_a_run(dataset, tmp_path, capsys):
    assert train.main(argv(dataset, tmp_path / "run", max_steps=4)) == 0
    main(["export", str(tmp_path / "run"), str(tmp_path / "hf")])
    assert "step 4 of" in capsys.readouterr().out
    ours = load_run(tmp_path / "run").model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        torch.testing.assert_close(theirs(X).logits, ours(X)[0], rtol=0, atol=ATOL)


def test_a_run_that_is_not_there_is_one_line_and_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", str(tmp_path / "none"), str(tmp_path / "hf")])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
