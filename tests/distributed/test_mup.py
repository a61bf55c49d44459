"""muP does not depend on how the parameters are sharded."""

from itertools import product

import pytest

from tests.distributed.runs import PARALLEL, distance, trained
from tests.distributed.test_equality import TOLERANCE
from trainer.checkpoint.read import open_checkpoint
from trainer.checkpoint.sharded import read_all

pytestmark = pytest.mark.xdist_group("gang")

WIDER = {"mup": "true", "mup_base_width": 5, "wd_scaling": "sqrt"}  # the width is 20, so m = 4
OPTIMIZERS = {
    "adamw": {
        "lr": 3e-3,
        "eps": 1e-6,
    },  # gradients are m times smaller; eps=1e-8 amplifies rounding
    "muon": {"lr": 3e-3, "eps": 1e-6},
    "sgd": {"lr": 0.01},
}


QUICK = {("adamw", "ddp"), ("muon", "fsdp")}  # the cases of `make test`


@pytest.mark.parametrize(
    ("optimizer", "parallel"),
    [
        pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
        for case in product(OPTIMIZERS, PARALLEL)
    ],
)
def test_several_processes_train_as_one_away_from_the_base_width(
    gang, dataset, tmp_path, optimizer, parallel
):
    settings = {"optimizer": optimizer, "dopr": "true", "max_steps": 3} | OPTIMIZERS[optimizer]
    size, how = PARALLEL[parallel]
    size = min(size, 2) if parallel != "hsdp" else size
    out = trained(gang, size, dataset, tmp_path / "run", **settings, **WIDER, **how)
    alone = trained(None, 1, dataset, tmp_path / "alone", **settings, **WIDER)
    assert distance(out, alone) < TOLERANCE
    plain = trained(None, 1, dataset, tmp_path / "plain", **settings)
    assert distance(out, plain) > 100 * TOLERANCE


def test_shards_of_two_processes_are_resumed_by_one(gang, dataset, tmp_path):
    settings = WIDER | {"optimizer": "muon", "dopr": "true", "schedule": "constant"}
    settings |= {"eps": 1e-6, "keep_checkpoints": 9}
    half = settings | {"max_steps": 3, "parallel": "fsdp", "checkpoint_format": "sharded"}
    alone = trained(None, 1, dataset, tmp_path / "alone", **settings, max_steps=6)
    trained(gang, 2, dataset, tmp_path / "run", **half)
    out = trained(None, 1, dataset, tmp_path / "run", **settings, max_steps=6)
    assert distance(out, alone) < TOLERANCE
    first = open_checkpoint(tmp_path / "run/checkpoints/step-00000003")
    assert read_all(first.model)["transformer.wte.weight"].shape[1] == 20
    assert first.manifest["model"]["logits_mult"] == 1 / 4
