"""Classes of other packages train in several processes as in one."""

import pytest

from tests.distributed.runs import PARALLEL, distance, run, trained

pytestmark = pytest.mark.xdist_group("gang")  # the tests share a gang of processes

TOLERANCE = 2e-5  # for fp32 sums in another order; the weights are about 0.02
DDP = {
    "lamb": {"lr": 1e-3},
    "kron": {"lr": 1e-3, "max_steps": 3},  # its random numbers must be the same in all processes
    "prodigy": {"lr": 0.3},
}
SHARDED = {
    "lion": {"lr": 1e-3, "max_steps": 3},
    "torch:nadam": {"lr": 3e-3},
    # With its default eps, it turns the rounding of a few gradients into a visible difference.
    "adabelief": {"lr": 3e-3, "optimizer_args": "eps=1e-10"},
    "schedulefreeadamw": {"lr": 3e-3, "schedule": "constant"},
}
QUICK = ("kron", "lion")  # in `make test`


def cases(names):
    return [pytest.param(x, marks=[] if x in QUICK else [pytest.mark.slow]) for x in names]


@pytest.mark.parametrize("dopr", [pytest.param("false", marks=pytest.mark.slow), "true"])
@pytest.mark.parametrize("optimizer", cases(DDP))
def test_ddp_trains_any_class_as_one_process(gang, dataset, tmp_path, optimizer, dopr):
    settings = {"optimizer": optimizer, "dopr": dopr} | DDP[optimizer]
    alone = trained(gang, 1, dataset, tmp_path / "alone", **settings)
    together = trained(gang, 2, dataset, tmp_path / "ddp", **settings)
    assert distance(alone, together) < TOLERANCE


@pytest.mark.parametrize("parallel", ["fsdp", pytest.param("hsdp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer", cases(SHARDED))
def test_shards_train_elementwise_classes_as_one_process(
    gang, dataset, tmp_path, optimizer, parallel
):
    size, how = PARALLEL[parallel]
    settings = {"optimizer": optimizer, "dopr": "true"} | SHARDED[optimizer]
    alone = trained(gang, 1, dataset, tmp_path / "alone", **settings)
    together = trained(gang, size, dataset, tmp_path / "shards", **settings, **how)
    assert distance(alone, together) < TOLERANCE


@pytest.mark.slow
def test_a_sharded_run_of_two_sets_of_weights_continues_as_if_it_had_not_stopped(
    gang, dataset, tmp_path
):
    settings = {"optimizer": "schedulefreeadamw", "schedule": "constant", "lr": 3e-3}
    settings |= {"parallel": "fsdp", "checkpoint_format": "sharded", "save_every": 3}
    whole = trained(gang, 3, dataset, tmp_path / "whole", **settings)
    parts = tmp_path / "parts"
    trained(gang, 3, dataset, parts, **settings | {"max_steps": 3})
    trained(gang, 3, dataset, parts, **settings)
    assert distance(whole, parts) == 0


def test_shards_of_other_classes_are_refused_in_every_process(gang, dataset, tmp_path):
    results = run(gang, 3, dataset, tmp_path, optimizer="soap", parallel="fsdp")
    assert {code for code, _ in results} == {1}
    assert all("use parallel=ddp" in text for _, text in results)
