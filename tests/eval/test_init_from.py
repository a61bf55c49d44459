"""Test that a run from a Hugging Face folder trains the folder's function or is refused."""

import json
import shutil

import pytest
import torch

import train
from data.tokenizer import byte_tokenizer, train_bpe
from eval.hf import export_hf
from eval.hf_import import check_tokenizer, load_hf
from eval.run import load_run
from tests.tiny import SETTINGS, metrics
from tests.tiny_gpt import gpt

SHAPE = ("n_layer", "n_head", "n_embd", "block_size")
TEXT = "the cat sat on the mat; the other cat sat on the first cat. " * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Export a model whose every size differs from the default of its setting."""
    path = tmp_path_factory.mktemp("hf")
    sizes = {"n_layer": 1, "n_head": 4, "n_embd": 32, "block_size": 24}
    export_hf(gpt(vocab_size=257, tie_weights=False, **sizes), byte_tokenizer(), path)
    return path


def start(dataset, out, folder, **changes):
    """Start a run of one step that is given no size but those in `changes`."""
    others = {key: value for key, value in SETTINGS.items() if key not in SHAPE}
    settings = others | {"max_steps": 1, "warmup_steps": 0, "init_from": folder, **changes}
    return train.main(
        [f"--{k}={v}" for k, v in (settings | {"dataset": dataset, "out_dir": out}).items()]
    )


def test_sizes_that_are_not_given_come_from_the_folder(dataset, tmp_path, folder, capsys):
    assert start(dataset, tmp_path, folder) == 0
    config = load_run(tmp_path).model.config
    assert [getattr(config, key) for key in SHAPE] == [1, 4, 32, 24]
    assert not config.tie_weights
    assert json.loads((tmp_path / "config.json").read_text())["n_head"] == 4
    assert f"n_head = 4  ({folder / 'config.json'})" in capsys.readouterr().out
    assert start(dataset, tmp_path, folder, max_steps=2) == 0  # resumes with the same sizes


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"n_head": 5}, 1),
        ({"n_layer": 1, "n_embd": 32}, 0),
        ({"dopr": True, "embeddings": True}, 0),
    ],
)
def test_settings_are_checked_against_the_sizes_of_the_folder(
    dataset, tmp_path, folder, capsys, changes, code
):
    """The default sizes are 12 heads, a width of 768 and tied weights."""
    assert start(dataset, tmp_path, folder, **changes) == code
    assert ("n_embd=32: must be divisible by n_head=5" in capsys.readouterr().err) == (code == 1)


def test_a_folder_that_cannot_be_read_is_listed_among_the_other_problems(tmp_path, capsys):
    assert start("text", tmp_path, tmp_path / "none", lr="x") == 1
    error = capsys.readouterr().err
    assert f"init_from={tmp_path / 'none'}: " in error
    assert "lr='x'" in error


@pytest.mark.parametrize(
    "changes",
    [{"n_head": 2}, {"n_layer": 2}, {"block_size": 32}, {"tie_weights": True}, {"bias": False}],
)
def test_a_size_that_makes_another_function_is_refused(dataset, tmp_path, folder, capsys, changes):
    assert start(dataset, tmp_path, folder, **changes) == 1
    ((key, value),) = changes.items()
    assert f"{key}={value} (there" in capsys.readouterr().err
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_smaller_block_size_keeps_the_first_positions(dataset, tmp_path, folder):
    assert start(dataset, tmp_path, folder, block_size=8, save_every=1) == 0
    assert load_run(tmp_path).model.config.block_size == 8
    rows = metrics(tmp_path, "val")
    assert start(dataset, tmp_path / "b", folder, block_size=8, seed=2) == 0
    assert metrics(tmp_path / "b", "val")[0]["loss"] == rows[0]["loss"]  # the folder's weights


def test_a_folder_with_another_tokenizer_is_refused_unless_it_is_meant(
    dataset, tmp_path, folder, capsys
):
    other = tmp_path / "hf"
    shutil.copytree(folder, other)
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    swapped = text.replace('"a": 97', '"a": 98').replace('"b": 98', '"b": 97', 1)
    (other / "tokenizer.json").write_text(swapped, encoding="utf-8")
    assert start(dataset, tmp_path / "a", other) == 1
    error = capsys.readouterr().err
    assert "differ at id 97" in error
    assert "--allow_tokenizer_mismatch=true" in error
    assert start(dataset, tmp_path / "b", other, allow_tokenizer_mismatch=True) == 0


def test_tokenizers_of_equal_size_are_compared_by_their_bytes(tmp_path):
    first, second = train_bpe([TEXT], 270), train_bpe([TEXT[::-1]], 270)
    export_hf(gpt(vocab_size=270), first, tmp_path)
    check_tokenizer(tmp_path, first)
    with pytest.raises(ValueError, match="differ at id"):
        check_tokenizer(tmp_path, second)


def test_without_a_tokenizer_to_compare_the_switch_is_named(dataset, tmp_path, folder, capsys):
    shutil.copytree(folder, tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").unlink()
    assert start(dataset, tmp_path / "a", tmp_path / "hf") == 1
    assert "--allow_tokenizer_mismatch=true" in capsys.readouterr().err


def test_weights_of_a_folder_start_a_run_unchanged(dataset, tmp_path, folder):
    assert start(dataset, tmp_path, folder, save_every=1, lr=1e-30, weight_decay=0) == 0
    expected = load_hf(folder).state_dict()
    found = load_run(tmp_path).model.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
