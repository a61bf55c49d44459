"""Tests that real processes call every planned collective, with its bytes and its group."""

from collections import Counter
from dataclasses import replace

import pytest

from bench.scale.plan import (
    Placement,
    gradient_calls,
    mean_calls,
    micro_batch_calls,
    muon_calls,
    refresh_calls,
)
from bench.scale.shapes import EXACT, DoprMode, ModelShape
from tests.bench.scale.counted import steps

pytestmark = pytest.mark.xdist_group("gang")  # all tests share one gang of processes

TINY = ModelShape("tiny", 2, 2, 20, 8, 64, 16, vocab_size=41)  # 3 cannot share its rows evenly
WIDE = ModelShape("wide", 1, 2, 128, 8, 64, 16, vocab_size=41)  # wide enough to be deflated
LAZY = DoprMode("lazy", 3, 3, 2, blocks_of_width=True)
LAZY_MEAN = LAZY._replace(name="lazy, fresh mean", fresh_mean=True)
DEFLATED = DoprMode("deflated", inverse="newton_schulz")
PLACEMENTS = {
    "ddp": Placement("ddp", 2),
    "fsdp": Placement("fsdp", 3),
    "hsdp": Placement("hsdp", 4, 2),
}


def counted(gang, shape, placement, base, mode, n):
    """Return the calls of `steps` with the largest number of bytes over all processes."""
    results = gang.run(placement.size, steps, shape, placement, base, mode, n)
    return [[max(each) for each in zip(*part, strict=True)] for part in zip(*results, strict=True)]


def planned(calls, placement):
    return [(call.kind, call.n_bytes, placement.ranks(call.over)) for call in calls]


@pytest.mark.parametrize("base", ["adamw", "muon"])
@pytest.mark.parametrize("how", PLACEMENTS)
def test_a_step_with_a_refresh_calls_the_planned_collectives(gang, how, base):
    placement = PLACEMENTS[how]
    first, last, end = counted(gang, TINY, placement, base, EXACT, 3)
    micro = planned(micro_batch_calls(TINY, placement), placement)
    gradients = planned(gradient_calls(TINY, placement), placement)
    assert Counter(first) == Counter(micro)
    assert Counter(last) == Counter(micro + gradients)
    expected = refresh_calls(TINY, EXACT, placement).calls
    expected += muon_calls(TINY, placement) if base == "muon" else []
    assert end == planned(expected, placement)


@pytest.mark.parametrize("n", [3, 4])
def test_blocks_of_sigma_are_sent_only_by_a_refresh(gang, n):
    placement = PLACEMENTS["ddp"]
    *_, end = counted(gang, TINY, placement, "adamw", LAZY, n)
    expected = refresh_calls(TINY, LAZY, placement).calls if n == 4 else []
    assert end == planned(expected, placement)


@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("how", PLACEMENTS)
def test_a_fresh_mean_is_sent_in_every_step(gang, how, n):
    placement, is_due = PLACEMENTS[how], n == 4
    first, _, end = counted(gang, TINY, placement, "adamw", LAZY_MEAN, n)
    assert Counter(first) == Counter(planned(micro_batch_calls(TINY, placement), placement))
    means = mean_calls(TINY, LAZY_MEAN, placement, is_due=is_due)
    (sums_of_z,) = planned(means, placement)
    d, n_layer = TINY.n_embd, TINY.n_layer
    rows = 2 if is_due else 1  # also the sums over the tokens in Σ
    assert sums_of_z == ("all_reduce", rows * 4 * n_layer * (7 * d + 4), placement.size)
    refresh = refresh_calls(TINY, LAZY_MEAN, placement).calls if is_due else []
    assert end == planned(means + refresh, placement)


def test_muon_sends_a_fresh_mean_before_its_matrices(gang):
    placement = PLACEMENTS["fsdp"]
    *_, end = counted(gang, TINY, placement, "muon", LAZY_MEAN, 2)
    means = mean_calls(TINY, LAZY_MEAN, placement, is_due=False)
    assert end == planned(means + muon_calls(TINY, placement), placement)


def test_the_deflation_basis_is_sent_with_its_inverse(gang):
    placement = PLACEMENTS["ddp"]
    *_, end = counted(gang, WIDE, placement, "adamw", DEFLATED, 1)
    plain = refresh_calls(WIDE, EXACT, placement)
    expected = refresh_calls(WIDE, DEFLATED, placement)
    assert end == planned(expected.calls, placement)
    columns = 16 * 4 * (3 * WIDE.n_embd + 4 * WIDE.n_embd)  # of the fp32 U of all four inputs
    more = [a.n_bytes - b.n_bytes for a, b in zip(expected.inverses, plain.inverses, strict=True)]
    assert sum(more) == columns


def test_adamw_without_dopr_sends_only_gradients(gang):
    placement = PLACEMENTS["fsdp"]
    *_, end = counted(gang, TINY, placement, "adamw", None, 1)
    assert end == []


def test_gradients_larger_than_a_bucket_are_sent_in_several_buckets(gang):
    placement = PLACEMENTS["ddp"]
    shape = replace(WIDE, n_layer=4)
    _, last, _ = counted(gang, shape, placement, "adamw", None, 3)
    expected = planned(gradient_calls(shape, placement), placement)
    assert len(expected) > 1
    assert last == expected
