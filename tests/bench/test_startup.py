"""Test the measurement of the memory with which processes build their shards."""

import argparse

import pytest
import torch

from bench import startup
from data.tokenizer import byte_tokenizer
from eval.hf import export_hf
from tests.tiny_gpt import gpt
from trainer.parallel import Parallel

pytestmark = pytest.mark.xdist_group("gang")  # the tests share a gang of processes


def measured(**arguments):
    with Parallel(torch.device("cpu"), mode="fsdp", timeout_s=60) as parallel:
        return startup.measure(parallel, argparse.Namespace(**arguments))


def in_process(arguments):
    return measured(**arguments)


@pytest.mark.slow
def test_a_model_that_is_built_whole_takes_more(gang):
    """GPT-2 has 474 MiB of weights, which are 158 in each of three processes."""
    options = {"size": "gpt2", "init_from": None}
    (sharded, *_), (whole, *_) = (
        gang.run(3, in_process, options | {"whole": whole}) for whole in (False, True)
    )
    assert sharded["whole_MiB"] == whole["whole_MiB"] == pytest.approx(474.4, abs=0.1)
    assert sharded["shards_MiB"] == pytest.approx(474.4 / 3, abs=0.1)
    assert sharded["MiB"] < whole["MiB"]
    assert whole["MiB"] > whole["whole_MiB"]


def test_a_folder_is_read_in_shards(gang, tmp_path):
    model = gpt(vocab_size=257, n_layer=2, n_head=2, n_embd=20, block_size=16)
    export_hf(model, byte_tokenizer(), tmp_path)
    options = {"size": "gpt2", "init_from": tmp_path, "whole": False}
    row, *_ = gang.run(3, in_process, options)
    n_bytes = sum(4 * parameter.numel() for parameter in model.parameters())
    assert row["whole_MiB"] == pytest.approx(n_bytes / 2**20)
    assert row["size"] == "init_from"
