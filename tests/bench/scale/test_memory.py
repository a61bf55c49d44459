"""Tests of the planned bytes against those that real processes hold and allocate."""

from dataclasses import replace
from itertools import product

import pytest

from bench.scale.calls import Placement
from bench.scale.memory import dopr_bytes, held_bytes, new_sum_bytes, peaks
from bench.scale.shapes import EXACT, FRESH_MEAN, MODES, SAMPLED, DoprMode, ModelShape
from tests.bench.scale import counted

pytestmark = pytest.mark.xdist_group("gang")  # all tests share one gang of processes

WIDE = ModelShape("wide", 2, 2, 128, 8, 64, 16, vocab_size=41)
WIDER = replace(WIDE, n_embd=192)  # so wide that a CPU forms the sums in place
LAZY = DoprMode("lazy", 4, 2, 2, blocks_of_width=True)  # every second collecting step refreshes
DEFLATED = EXACT._replace(name="deflated", inverse="newton_schulz")
SHARDED = {"fsdp": Placement("fsdp", 3), "hsdp": Placement("hsdp", 4, 2)}
WHOLE = {"ddp": Placement("ddp", 2), "replicated": Placement("fsdp", 3, statistics="replicated")}


QUICK = {("ddp", EXACT), ("fsdp", FRESH_MEAN), ("hsdp", DEFLATED), ("replicated", SAMPLED)}


@pytest.mark.parametrize(
    ("how", "mode"),
    [
        pytest.param(
            *case,
            id=f"{case[0]}-{case[1].name}",
            marks=[] if case in QUICK else [pytest.mark.slow],
        )
        for case in product(SHARDED | WHOLE, [*MODES, DEFLATED])
    ],
)
def test_every_process_holds_the_planned_statistics(gang, how, mode):
    placement = (SHARDED | WHOLE)[how]
    found = gang.run(placement.size, counted.held, WIDE, placement, mode, 1)
    planned = dopr_bytes(WIDE, mode, placement)
    for process, steps in enumerate(found):
        rank = process % placement.shards
        kept = held_bytes(WIDE, mode, placement, rank)
        with_sums = kept + new_sum_bytes(WIDE, mode, placement, rank)
        assert steps == [(with_sums, with_sums, kept)]
    assert max(kept for ((*_, kept),) in found) == planned["Σ, sums, P, U, μ"]
    assert max(first - kept for ((first, _, kept),) in found) == planned["new sums"]
    assert (planned["new sums"] > 0) == (how in SHARDED)


@pytest.mark.parametrize("how", ["fsdp", pytest.param("hsdp", marks=pytest.mark.slow)])
def test_sums_that_no_refresh_follows_are_kept_between_steps(gang, how):
    placement = SHARDED[how]
    found = gang.run(placement.size, counted.held, WIDE, placement, LAZY, 3)
    assert dopr_bytes(WIDE, LAZY, placement)["new sums"] == 0
    for process, (first, second, third) in enumerate(found):
        rank = process % placement.shards
        most = held_bytes(WIDE, LAZY, placement, rank)
        fewest = most - new_sum_bytes(WIDE, SAMPLED, placement, rank)
        assert fewest < most
        assert first == (most, most, fewest)
        assert second == (fewest,) * 3
        assert third == (most,) * 3


def test_sharded_statistics_take_less_in_every_process(gang):
    sharded, whole = (
        gang.run(3, counted.held, WIDE, placement, FRESH_MEAN, 1)
        for placement in (SHARDED["fsdp"], WHOLE["replicated"])
    )
    assert 2 * max(max(step) for (step,) in sharded) < min(min(step) for (step,) in whole)


@pytest.mark.parametrize(
    ("how", "mode"),
    [
        pytest.param("fsdp", EXACT, id="fsdp-exact"),
        pytest.param("fsdp", SAMPLED, id="fsdp-sampled", marks=pytest.mark.slow),
        pytest.param("hsdp", EXACT, id="hsdp-exact", marks=pytest.mark.slow),
        pytest.param("hsdp", SAMPLED, id="hsdp-sampled", marks=pytest.mark.slow),
    ],
)
def test_sums_and_rows_take_the_planned_bytes(gang, how, mode):
    placement = SHARDED[how]
    found = gang.run(placement.size, counted.peaks, WIDER, placement, mode)
    planned = dopr_bytes(WIDER, mode, placement)
    for key in ("backward", "exchange"):
        assert max(each[key] for each in found) == pytest.approx(planned[key], rel=0.01)


@pytest.mark.parametrize(("n_micro", "in_backward"), [(1, 100), (2, 130)])
def test_sums_grow_while_a_first_backward_frees_activations(n_micro, in_backward):
    base = dict.fromkeys(["weights, gradients, state", "Muon's matrices"], 0.0)
    base |= {"activations": 100.0, "gathered weights": 7.0}
    dopr = {"Σ, sums, P, U, μ": 60.0, "new sums": 30.0, "backward": 5.0, "refresh": 0.0}
    alone, with_dopr = peaks(base, dopr | {"exchange": 0.0}, n_micro)
    assert (alone, with_dopr) == (107, 7 + in_backward + 60 + 5)
    _, refresh = peaks(base, dopr | {"refresh": 1000.0, "exchange": 1020.0}, n_micro)
    assert refresh == 60 + 30 + 1000  # the exchange comes after the sums were freed
