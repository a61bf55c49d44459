"""The initial weights of sharded models, which no process builds whole."""

import pytest
import torch

from data.tokenizer import byte_tokenizer
from eval.hf import export_hf
from eval.hf_import import missing_shape
from eval.in_training import load_initial_weights
from optim.process_group import local
from tests.distributed.runs import PARALLEL, distance, trained
from tests.tiny import argv, metrics
from tests.tiny_gpt import gpt
from trainer.build import draw_shards, make_model
from trainer.config import load_config
from trainer.parallel import Parallel
from trainer.sharding import full_tensor

pytestmark = pytest.mark.xdist_group("gang")  # the tests share a gang of processes

VOCAB_SIZE = 257  # not divisible by the number of processes
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 20, "block_size": 16}


def drawn(arguments, how):
    """Return the number of local rows of every weight, and the whole weights."""
    config, _ = load_config(arguments)
    mode, shard_size = how["parallel"], how.get("shard_size")
    with Parallel(torch.device("cpu"), mode=mode, shard_size=shard_size, timeout_s=60) as parallel:
        model = make_model(config, VOCAB_SIZE, is_empty=True)
        assert all(parameter.is_meta for parameter in model.parameters())
        parallel.place(model)
        draw_shards(model, config.seed)
        weights = dict(model.named_parameters())
        rows = {name: len(local(weight)) for name, weight in weights.items()}
        return rows, {name: full_tensor(w.detach()).numpy() for name, w in weights.items()}


@pytest.mark.parametrize(
    ("parallel", "tie_weights"),
    [
        ("fsdp", "true"),
        ("hsdp", "false"),
        pytest.param("fsdp", "false", marks=pytest.mark.slow),
        pytest.param("hsdp", "true", marks=pytest.mark.slow),
    ],
)
def test_shards_hold_the_weights_of_a_whole_model(gang, tmp_path, parallel, tie_weights):
    size, how = PARALLEL[parallel]
    settings = {"tie_weights": tie_weights, "bias": "true", "seed": 7}
    arguments = argv(tmp_path, tmp_path, **settings)
    model = make_model(load_config(arguments)[0], VOCAB_SIZE)
    shards = how.get("shard_size", size)
    for rows, weights in gang.run(size, drawn, arguments, how):
        assert weights.keys() == dict(model.named_parameters()).keys()
        for name, weight in model.named_parameters():
            assert (weights[name] == weight.detach().numpy()).all(), name
            assert rows[name] <= -(-len(weight) // shards)


def imported(arguments):
    """Return the number of local rows of every weight, and the whole weights, of a folder."""
    config, _ = load_config(arguments, missing_shape=missing_shape)
    with Parallel(torch.device("cpu"), mode="fsdp", timeout_s=60) as parallel:
        model = make_model(config, VOCAB_SIZE, is_empty=True)
        parallel.place(model)
        load_initial_weights([model], config, byte_tokenizer())
        weights = dict(model.named_parameters())
        rows = {name: len(local(weight)) for name, weight in weights.items()}
        return rows, {name: full_tensor(w.detach()).numpy() for name, w in weights.items()}


def test_shards_are_read_from_a_hugging_face_folder(gang, tmp_path):
    model = gpt(vocab_size=VOCAB_SIZE, **SIZES)
    export_hf(model, byte_tokenizer(), tmp_path)
    for rows, weights in gang.run(3, imported, [f"--init_from={tmp_path}"]):
        for name, weight in model.named_parameters():
            assert (weights[name] == weight.detach().numpy()).all(), name
            assert rows[name] <= -(-len(weight) // 3)


@pytest.mark.slow
@pytest.mark.parametrize("ema_decay", [0, 0.9])
def test_a_sharded_run_starts_from_a_folder_as_one_process_does(gang, dataset, tmp_path, ema_decay):
    folder = tmp_path / "hf"
    export_hf(gpt(vocab_size=VOCAB_SIZE, **SIZES), byte_tokenizer(), folder)
    # The gradient of a key's bias is only rounding error, which a small eps turns into a step.
    settings = {"init_from": folder, "ema_decay": ema_decay, "bias": "true", "eps": 1e-5, **SIZES}
    alone = trained(None, 1, dataset, tmp_path / "alone", **settings)
    out = trained(gang, 3, dataset, tmp_path / "run", parallel="fsdp", **settings)
    assert distance(out, alone) < 1e-5
    for ours, theirs in zip(metrics(out, "val"), metrics(alone, "val"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_averaged_weights_start_as_the_weights(gang, dataset, tmp_path):
    settings = {"parallel": "fsdp", "ema_decay": 0.9, "max_steps": 2}
    row = metrics(trained(gang, 3, dataset, tmp_path / "run", **settings), "val")[0]
    assert row["step"] == 0
    assert row["ema_loss"] == row["loss"]
