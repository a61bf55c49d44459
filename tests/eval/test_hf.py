"""Test that import and export keep logits and ids, and that errors name their cause."""

import json
import sys

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import train
from data.tokenizer import byte_tokenizer
from eval.generate import generate
from eval.hf import export_hf, main
from eval.hf_import import load_hf
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


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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


# -- other files of weights


def as_index(folder, name, save):
    """Split the weights of a folder into two shards, written by `save`."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {f"{i}-{name}": [*weights][i::2] for i in range(2)}
    for file, keys in shards.items():
        save({key: weights[key] for key in keys}, folder / file)
    places = {key: file for file, keys in shards.items() for key in keys}
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


LAYOUTS = {
    "safetensors in shards": lambda folder: as_index(folder, "model.safetensors", save_file),
    "pickle": as_pickle,
    "pickle in shards": lambda folder: as_index(folder, "pytorch_model.bin", torch.save),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_files_gives_the_same_weights(tmp_path, layout):
    hf_gpt2(tmp_path)
    expected = load_hf(tmp_path).state_dict()
    LAYOUTS[layout](tmp_path)
    found = load_hf(tmp_path).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_shards_that_transformers_writes_are_read(tmp_path):
    theirs = hf_gpt2(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert len([*(tmp_path / "parts").glob("model-*.safetensors")]) > 1
    with torch.no_grad():
        torch.testing.assert_close(
            load_hf(tmp_path / "parts").eval()(X)[0], theirs(X).logits, rtol=0, atol=ATOL
        )


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/hosts", "none.safetensors"])
def test_an_index_names_only_files_of_its_folder(tmp_path, name):
    hf_gpt2(tmp_path)
    LAYOUTS["safetensors in shards"](tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["transformer.wte.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json|none.safetensors"):
        load_hf(tmp_path)


def test_a_smaller_block_size_keeps_the_first_positions(tmp_path):
    theirs = hf_gpt2(tmp_path)
    ours = load_hf(tmp_path, block_size=8)
    assert ours.config.block_size == 8
    with torch.no_grad():
        torch.testing.assert_close(
            ours.eval()(X[:, :8])[0], theirs(X[:, :8]).logits, rtol=0, atol=ATOL
        )


@pytest.mark.parametrize("tie_weights", [True, False])
def test_ids_that_pad_the_vocabulary_are_dropped_when_a_run_is_loaded(tmp_path, tie_weights):
    padded = gpt(vocab_size=320, tie_weights=tie_weights)
    export_hf(padded, byte_tokenizer(), tmp_path)
    run = load_run(tmp_path)
    assert run.model.config.vocab_size == run.tokenizer.n_vocab == 257
    with torch.no_grad():
        expected = padded(X)[0][..., :257]
        torch.testing.assert_close(run.model(X)[0], expected, rtol=0, atol=ATOL)
    for ids in generate(run.model, [[0]] * 32, 15, generator=torch.Generator().manual_seed(0)):
        run.tokenizer.decode(ids)  # raises ValueError for an unknown id


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
    with pytest.raises(ValueError, match=rf"config.json: .*{key}.*{value!r}"):
        load_hf(tmp_path)


def test_missing_unexpected_and_misshapen_weights_are_all_listed(tmp_path):
    hf_gpt2(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.ln_f.bias"]
    weights["transformer.h.1.extra"] = torch.zeros(1)
    weights["transformer.ln_f.weight"] = torch.zeros(8)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing transformer\.ln_f\.bias") as error:
        load_hf(tmp_path)
    assert "unexpected transformer.h.1.extra" in str(error.value)
    assert "transformer.ln_f.weight is (8,), but must be (32,)" in str(error.value)


def test_a_folder_without_the_files_says_how_to_get_them(tmp_path):
    with pytest.raises(ValueError, match=r"config.json: cannot be read"):
        load_hf(tmp_path)
    hf_gpt2(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(ValueError, match="damaged"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors or pytorch_model.bin"):
        load_hf(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("n_layer", 10**9), ("n_embd", 2**40), ("vocab_size", 2**62), ("n_positions", 8)],
)
def test_sizes_are_compared_before_a_model_is_built(tmp_path, key, value):
    hf_gpt2(tmp_path)
    edit_config(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=rf"does not fit its config.json: .*{value}"):
        load_hf(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("n_head", "4"), ("n_embd", 32.0), ("n_layer", None)])
def test_a_size_that_is_no_integer_is_named_with_its_file(tmp_path, key, value):
    hf_gpt2(tmp_path)
    edit_config(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=rf"config.json: {key}: .*valid integer") as error:
        load_hf(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_or_no_floats_are_refused(tmp_path):
    hf_gpt2(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.ln_f.bias"][3] = torch.nan
    weights["transformer.ln_f.weight"] = torch.ones(32, dtype=torch.int64)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"ln_f\.bias is not finite") as error:
        load_hf(tmp_path)
    assert "ln_f.weight is torch.int64" in str(error.value)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a pickle ran')",))


@pytest.mark.parametrize(
    "content", [Evil(), [torch.ones(1)], {"a": 1}], ids=["code", "list", "int"]
)
def test_a_pickle_that_is_no_dict_of_tensors_is_refused(tmp_path, content):
    hf_gpt2(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: "):
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


def test_a_folder_with_files_is_refused_before_the_run_is_loaded(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        main(["export", "no-run", str(tmp_path)])
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path} is not empty")
    assert "--overwrite" in error
    assert error.count("\n") == 1


def test_overwrite_replaces_an_earlier_export_and_keeps_other_files(dataset, tmp_path):
    assert train.main(argv(dataset, tmp_path / "run", max_steps=4)) == 0
    export_hf(gpt(), byte_tokenizer(), tmp_path / "hf")
    (tmp_path / "hf/notes.txt").write_text("mine")
    main(["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--overwrite"])
    main(["export", str(tmp_path / "run"), str(tmp_path / "new")])
    new = files_of(tmp_path / "new")
    assert files_of(tmp_path / "hf") == new | {"notes.txt": b"mine"}


def test_an_export_that_fails_leaves_the_earlier_one_intact(tmp_path, monkeypatch):
    export_hf(gpt(), byte_tokenizer(), tmp_path)
    before = files_of(tmp_path)

    def fill_the_disk(weights, path, **rest):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("eval.hf.save_file", fill_the_disk)
    model = gpt(n_embd=16)
    with pytest.raises(OSError, match=r"model.safetensors could not be written: No space left"):
        export_hf(model, byte_tokenizer(), tmp_path, overwrite=True)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("mark", ["checkpoints", "manifest.json"])
def test_overwrite_does_not_write_into_a_run(tmp_path, mark):
    (tmp_path / mark).mkdir()
    with pytest.raises(ValueError, match="contains a run"):
        export_hf(gpt(), byte_tokenizer(), tmp_path, overwrite=True)
    assert [*tmp_path.iterdir()] == [tmp_path / mark]


def test_a_run_that_is_not_there_is_one_line_and_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", str(tmp_path / "none"), str(tmp_path / "hf")])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
