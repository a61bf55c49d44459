"""The initial weights of sharded models, which no process builds whole."""

import pytest
import torch

from optim.process_group import local
from tests.distributed.runs import PARALLEL, trained
from tests.tiny import argv, metrics
from trainer.build import draw_shards, make_model
from trainer.config import load_config
from trainer.parallel import Parallel
from trainer.sharding import full_tensor

pytestmark = pytest.mark.xdist_group("gang")  # the tests share a gang of processes

VOCAB_SIZE = 257  # not divisible by the number of processes


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


@pytest.mark.parametrize("tie_weights", ["true", "false"])
@pytest.mark.parametrize("parallel", ["fsdp", "hsdp"])
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


def test_averaged_weights_start_as_the_weights(gang, dataset, tmp_path):
    settings = {"parallel": "fsdp", "ema_decay": 0.9, "max_steps": 2}
    row = metrics(trained(gang, 3, dataset, tmp_path / "run", **settings), "val")[0]
    assert row["step"] == 0
    assert row["ema_loss"] == row["loss"]
