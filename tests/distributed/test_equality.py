"""Several processes train like one process on the same micro-batches."""

from itertools import product

import pytest

from tests.distributed.runs import DOPR, OPTIMIZERS, PARALLEL, distance, trained
from tests.tiny import metrics

pytestmark = pytest.mark.xdist_group("gang")  # the tests share a gang of processes

TOLERANCE = 1e-5  # for fp32 sums in another order; the weights are about 0.02


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory):
    """Return a function that trains with given settings in one process, once per settings."""
    made = {}

    def run(**settings):
        key = tuple(settings.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            made[key] = trained(None, 1, dataset, folder, **settings)
        return made[key]

    return run


QUICK = {("adamw", "exact", "ddp"), ("adamw", "fresh mean", "fsdp"), ("muon", "exact", "hsdp")}
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
    for case in product(OPTIMIZERS, DOPR, PARALLEL)
]


@pytest.mark.parametrize(("optimizer", "dopr", "parallel"), CASES)
def test_every_optimizer_trains_as_in_one_process(
    gang, dataset, tmp_path, alone, optimizer, dopr, parallel
):
    settings = {"optimizer": optimizer} | OPTIMIZERS[optimizer] | DOPR[dopr]
    size, how = PARALLEL[parallel]
    out = trained(gang, size, dataset, tmp_path / "run", **settings, **how)
    reference = alone(**settings)
    assert distance(out, reference) < TOLERANCE
    for kind in ("train", "val"):
        ours, theirs = metrics(out, kind), metrics(reference, kind)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        losses = [row["loss"] for row in theirs]
        assert [row["loss"] for row in ours] == pytest.approx(losses, abs=TOLERANCE)
    norms = [row["grad_norm"] for row in metrics(reference, "train")]
    assert [row["grad_norm"] for row in metrics(out, "train")] == pytest.approx(norms, rel=1e-4)
