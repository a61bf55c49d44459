"""Tests that real processes call every planned collective, with its bytes and its group."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest

from bench.scale.base_plan import gradient_calls, micro_batch_calls, muon_calls
from bench.scale.calls import Placement
from bench.scale.plan import reduce_calls, step_calls
from bench.scale.shapes import EXACT, DoprMode, ModelShape
from tests.bench.scale.counted import small_messages, steps

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
    "replicated": Placement("fsdp", 3, statistics="replicated"),
}
MEAN = "all_reduce", 4 * TINY.n_layer * (7 * TINY.n_embd + 4)  # Σ z and a count per layer


def quick(*cases):
    """Return all placements, slow except for some."""
    return [pytest.param(x, marks=[] if x in cases else [pytest.mark.slow]) for x in PLACEMENTS]


def planned(calls, placement):
    return [(call.kind, call.n_bytes, placement.ranks(call.over)) for call in calls]


def kinds(calls):
    return [kind for kind, *_ in calls]


def check(gang, shape, placement, base, mode, due, *, is_small=False):
    """Check the collectives of every process in some steps; return those of the first process.

    due: whether a step refreshes, for the number of each step that is checked.
    """
    results = gang.run(placement.size, steps, shape, placement, base, mode, max(due), is_small)
    for n, is_due in due.items():
        micro = planned(micro_batch_calls(shape, placement), placement)
        if is_due:
            micro += planned(reduce_calls(shape, mode, placement), placement)
        gradients = planned(gradient_calls(shape, placement), placement)
        for process, found in enumerate(results):
            first, last, end = found[n - 1]
            rank = process % placement.shards
            calls = step_calls(shape, mode, placement, is_due=is_due, rank=rank)
            calls += muon_calls(shape, placement, rank) if base == "muon" else []
            assert Counter(first) == Counter(micro)
            assert Counter(last) == Counter(micro + gradients)
            assert end == planned(calls, placement)
    return [results[0][n - 1] for n in due]


QUICK = {("ddp", "muon"), ("fsdp", "adamw"), ("hsdp", "muon"), ("replicated", "adamw")}


@pytest.mark.parametrize(
    ("how", "base"),
    [
        pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
        for case in product(PLACEMENTS, ["adamw", "muon"])
    ],
)
def test_a_step_with_a_refresh_calls_the_planned_collectives(gang, how, base):
    [(first, _, end)] = check(gang, TINY, PLACEMENTS[how], base, EXACT, {3: True})
    n_muon = 2 if base == "muon" else 0  # param groups: q, k and v, and the other matrices
    assert kinds(first).count("reduce") == (8 if how in ("fsdp", "hsdp") else 0)
    assert kinds(end) == {
        "ddp": ["all_reduce"] * 3 + ["broadcast"] * 2 + ["all_gather"] * n_muon,
        "fsdp": ["all_reduce"] * 2 + ["all_to_all"] * 2 + ["all_reduce"],
        "hsdp": ["all_reduce"] * 3 + ["all_to_all"] * 2 + ["all_reduce"],
        "replicated": ["all_reduce"] * 3 + ["broadcast"] * 3 + ["all_reduce"],
    }[how] + ["all_to_all"] * (0 if how == "ddp" else 2 * n_muon)


@pytest.mark.parametrize("how", quick("ddp", "hsdp"))
def test_bounded_messages_are_sent_one_after_the_other(gang, how):
    placement = PLACEMENTS[how]
    with small_messages():
        [(_, _, end)] = check(gang, TINY, placement, "muon", EXACT, {1: True}, is_small=True)
    found = Counter(kinds(end))
    assert {
        "ddp": found["all_gather"] > 2 and found["broadcast"] > 2 and found["all_reduce"] > 3,
        "fsdp": found["all_to_all"] > 2 + 4,
        "hsdp": found["all_to_all"] > 2 + 4 and found["all_reduce"] > 4,
        "replicated": found["broadcast"] > 3 and found["all_reduce"] > 4,
    }[how]


@pytest.mark.parametrize("how", quick("ddp", "hsdp"))
def test_statistics_are_sent_only_where_they_are_collected(gang, how):
    due = {3: False, 4: True}
    without, with_refresh = check(gang, TINY, PLACEMENTS[how], "adamw", LAZY, due)
    is_shared = how in ("fsdp", "hsdp")
    for (first, _, end), is_due in ((without, False), (with_refresh, True)):
        assert ("reduce" in kinds(first)) == (is_shared and is_due)
        if not is_due:
            assert kinds(end) == (["all_to_all"] * 2 if is_shared else [])


@pytest.mark.parametrize("how", quick("ddp", "fsdp"))
def test_a_fresh_mean_is_sent_in_every_step(gang, how):
    placement, due = PLACEMENTS[how], {3: False, 4: True}
    without, with_refresh = check(gang, TINY, placement, "adamw", LAZY_MEAN, due)
    kind, n_bytes = MEAN
    for (_, _, calls), rows in ((without, 1), (with_refresh, 2)):  # 2: also of the tokens in Σ
        assert calls[rows - 1] == (kind, rows * n_bytes, placement.size)  # after the counts


def test_muon_sends_its_matrices_after_the_rows_of_a_fresh_mean(gang):
    [(_, _, end)] = check(gang, TINY, PLACEMENTS["fsdp"], "muon", LAZY_MEAN, {2: False})
    assert kinds(end) == ["all_reduce"] + ["all_to_all"] * (2 + 4)


def test_the_deflation_basis_is_sent_with_its_inverse(gang):
    placement = PLACEMENTS["ddp"]
    check(gang, WIDE, placement, "adamw", DEFLATED, {1: True})
    plain, deflated = (
        sum(call.n_bytes for call in step_calls(WIDE, mode, placement, is_due=True, rank=0))
        for mode in (EXACT, DEFLATED)
    )
    columns = 16 * 4 * (3 * WIDE.n_embd + 4 * WIDE.n_embd)  # of the fp32 U of all four inputs
    assert deflated - plain == columns


def test_adamw_without_dopr_sends_only_gradients(gang):
    for [(_, _, end)] in gang.run(3, steps, TINY, PLACEMENTS["fsdp"], "adamw", None, 1):
        assert end == []


def test_gradients_larger_than_a_bucket_are_sent_in_several_buckets(gang):
    placement = PLACEMENTS["ddp"]
    shape = replace(WIDE, n_layer=4)
    expected = planned(gradient_calls(shape, placement), placement)
    assert len(expected) > 1
    for *_, (_, last, _) in gang.run(2, steps, shape, placement, "adamw", None, 3):
        assert last == expected
