"""Tests of the numbers of GPUs on which a model fits."""

from dataclasses import replace

import pytest

from bench.scale.calls import Placement
from bench.scale.fits import fewest, gigabytes, need
from bench.scale.hardware import HARDWARE
from bench.scale.shapes import MODES, SHAPES

SMALL, FRESH = SHAPES["124M"], "fresh mean"


@pytest.fixture(scope="module")
def found():
    places = Placement("ddp", 1), Placement("fsdp", 2), Placement("fsdp", 8), Placement("hsdp", 16)
    return [need(SMALL, placement) for placement in places]


def test_a_margin_is_ten_percent_and_replicating_costs_memory(found):
    for each in found:
        n_bytes = each.n_bytes
        assert n_bytes["AdamW + 10 %"] == pytest.approx(1.1 * n_bytes["AdamW"])
        for mode in MODES:
            assert n_bytes["AdamW"] < n_bytes[mode.name] <= n_bytes[f"{mode.name}, replicated"]
            is_alone = each.placement.size == 1
            assert (n_bytes[mode.name] == n_bytes[f"{mode.name}, replicated"]) == is_alone


def test_the_fewest_gpus_have_just_enough_memory(found):
    _, two, _, _ = found
    gpu = replace(HARDWARE["h100"], name="gpu", usable_memory=1, memory=two.n_bytes[FRESH])
    keys = list(found[0].n_bytes)
    for memory, expected in ((gpu.memory, "2"), (gpu.memory - 1, "8"), (1, "none")):
        row = fewest(found, [replace(gpu, memory=memory)]).splitlines()[-1]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[0] == "124M gpu"
        assert cells[1 + keys.index(FRESH)] == expected


def test_gigabytes_are_those_of_the_chosen_sizes(found):
    row = gigabytes(found, [8]).splitlines()[-1]
    eight = found[2].n_bytes
    modes = " / ".join(f"{eight[mode.name] / 1e9:.3g}" for mode in MODES)
    assert row == f"| 124M | {eight['AdamW'] / 1e9:.3g} / {modes} |"
