"""Tests of the parts of the cost model against closed forms."""

import math
from dataclasses import replace

import pytest
import torch

from bench.scale import network, work
from bench.scale.calls import CollectiveCall, Placement, sent_bytes
from bench.scale.hardware import HARDWARE
from bench.scale.memory import dopr_bytes
from bench.scale.plan import reduce_calls, refresh_calls
from bench.scale.refresh import refresh_seconds
from bench.scale.shapes import EXACT, FRESH_MEAN, MODES, SAMPLED, SHAPES, ModelShape, gpt, layers
from bench.scale.step import estimate, statistics_seconds
from model import GPT
from optim import ActivationPreconditioner

H100, SMALL = HARDWARE["h100"], SHAPES["124M"]
FREE = {"memory_rate": math.inf, "host_read": 0.0, "start": 0.0}
D, L = SMALL.n_embd, SMALL.n_layer
TRIANGLE = 17 / 32  # the part of a matrix that is sent, in 16 strips of rows


def step_of(placement, mode=SAMPLED, hardware=H100):
    return estimate(SMALL, placement, "adamw", mode, hardware, min_tokens=4096)


def test_an_all_reduce_in_a_node_is_a_ring():
    hardware = replace(H100, start=0, nvlink_hop=0)
    found = network.seconds(CollectiveCall("all_reduce", 8 * 10**9), Placement("ddp", 8), hardware)
    assert found == pytest.approx(2 * 7 / 8 * 8e9 / (450e9 * 0.8))


def test_between_nodes_the_slower_link_counts():
    call, placement = CollectiveCall("all_gather", 10**9, "shard"), Placement("fsdp", 64)
    slow = replace(H100, network=1e9, network_fraction=1, start=0, nvlink_hop=0, network_hop=0)
    assert network.seconds(call, placement, slow) == pytest.approx(63 / 64 / 8)
    replicate = CollectiveCall("all_reduce", 10**9, "replicate")  # one GPU and card per node
    assert network.seconds(replicate, Placement("hsdp", 64), slow) == pytest.approx(2 * 7 / 8)


def test_many_processes_reduce_over_a_tree_and_gather_over_a_ring():
    small, hardware = CollectiveCall("all_reduce", 0), replace(H100, start=0)
    tree = network.seconds(small, Placement("ddp", 4096), hardware)
    assert tree == pytest.approx(2 * (7 * 1.9e-6 + 9 * 4.0e-6))
    ring = network.seconds(
        CollectiveCall("all_gather", 0, "shard"), Placement("fsdp", 4096), hardware
    )
    assert ring == pytest.approx(3584 * 1.9e-6 + 511 * 4.0e-6)


def test_pipelined_broadcasts_count_the_latency_of_the_ring_once():
    calls, placement = 5 * [CollectiveCall("broadcast", 10**6)], Placement("ddp", 64)
    one, five = (network.broadcasts(each, placement, H100) for each in (calls[:1], calls))
    assert five - one == pytest.approx(4 * (14e-6 + 1e6 / 340e9))
    reduce = CollectiveCall("reduce", 10**6)
    assert network.seconds(reduce, placement, H100) == pytest.approx(one)


def test_the_flops_equal_the_closed_forms():
    hardware = replace(H100, **FREE, tf32=3, apply_fraction=1, bf16=1, gram_fraction=1)
    one_gpu = Placement("ddp", 1)
    assert work.apply(SMALL, EXACT, one_gpu, hardware) == 48 * L * D**3
    assert work.apply(SMALL, SAMPLED, one_gpu, hardware) == 24 * L * D**3
    batch = work.Batch(SMALL, 8, 1, SMALL.micro_tokens)
    assert work.gram(SMALL, one_gpu, EXACT, batch, hardware) == 2**16 * 19 * L * D**2
    assert work.gram(SMALL, one_gpu, SAMPLED, batch, hardware) == 2**13 * 7 * L * D**2


def test_a_sum_that_goes_to_an_owner_is_cleared_packed_and_added():
    hardware = replace(H100, memory_rate=1, memory_fraction=1, bf16=math.inf)
    batch = work.Batch(SMALL, 8, 1, 2**14)  # 4 micro-batches
    whole, shared = (
        work.gram(SMALL, placement, SAMPLED, batch, hardware)
        for placement in (Placement("ddp", 12), Placement("fsdp", 12))
    )
    assert whole == 4 * 8 * 7 * L * D**2
    formed = (4 + 8 * TRIANGLE) * 7 * L * D**2
    received = (4 * 8 + 3 * 12) * 7 * D**2  # each owns a twelfth of Σ; the first sum is not added
    assert shared - whole == 4 * formed + received


def test_a_refresh_packs_and_unpacks_what_it_sends():
    hardware = replace(H100, memory_rate=1, memory_fraction=1)
    one, whole, replicated, shared, copies = (
        work.repacking(SMALL, SAMPLED, placement, hardware)
        for placement in (
            Placement("ddp", 1),
            Placement("ddp", 12),
            Placement("fsdp", 12, statistics="replicated"),
            Placement("fsdp", 12),
            Placement("hsdp", 24, 12),
        )
    )
    own = 7 * D**2  # of 12 processes; one process has L times as much
    assert one == (2 * 20 + 4) * L * own
    packing = 16 * TRIANGLE * (L + 1) + 8 * (2 * L + 1)
    assert whole == replicated == (20 * (L + 1) + 4 * L + packing) * own
    assert shared == 2 * 20 * own
    assert copies - shared == (16 * TRIANGLE + 2 * 8) * own


def test_the_bytes_of_the_statistics_equal_the_closed_forms():
    inputs, outputs = 7 * L * D, 9 * L * D  # features of z and of grad_y
    masking = 4 * (inputs + outputs)  # z copied, and grad_y read twice, in bf16
    sampling = 4 * (inputs + outputs)  # both copied
    found = {
        (mode.name, mode.token_stride, is_collecting): work.token_bytes(
            SMALL, mode, is_collecting=is_collecting
        )
        for mode in (*MODES, FRESH_MEAN._replace(token_stride=1))
        for is_collecting in (True, False)
    }
    assert found == {
        ("exact", 1, True): masking,
        ("exact", 1, False): 0,
        ("sampled", 8, True): (sampling + masking) / 8,
        ("sampled", 8, False): 0,
        ("fresh mean", 8, True): (sampling + masking) / 8,  # the kernel of z zᵀ sums z
        ("fresh mean", 8, False): (sampling + masking + 2 * inputs) / 8,
        ("fresh mean", 1, True): masking,
        ("fresh mean", 1, False): masking + 2 * inputs,
    }


def test_a_fresh_mean_corrects_m_where_it_is_computed():
    hardware = replace(H100, memory_rate=1, memory_fraction=1)
    whole, rows, owner = (
        work.correction(SMALL, FRESH_MEAN, placement, hardware)
        for placement in (
            Placement("ddp", 8),
            Placement("fsdp", 8, statistics="replicated"),
            Placement("fsdp", 12),
        )
    )
    m_bytes, p_bytes = 12 * 12 * L * D**2, 4 * 7 * L * D**2
    assert whole == m_bytes + p_bytes
    assert rows == m_bytes / 8 + p_bytes
    # Every GPU owns one wide and three narrow inputs; the three may be those with the most rows.
    assert owner == 12 * (4 + 3 * 4) * D**2 + p_bytes / 12


def test_a_fresh_mean_adds_a_sum_of_z_in_every_step_and_a_second_one_in_a_refresh():
    sampled, fresh_mean = (step_of(Placement("ddp", 8), mode) for mode in (SAMPLED, FRESH_MEAN))
    sent = 2 * 7 / 8 * 4 * L * (7 * D + 4) * (1 + 1 / 10)
    assert fresh_mean.dopr_sent - sampled.dopr_sent == pytest.approx(sent)
    held = 4 * L * (7 * D + 2 * (7 * D + 4))  # the means and both rows of sums
    assert fresh_mean.dopr_bytes - sampled.dopr_bytes == held
    added = fresh_mean.dopr_s.keys() - sampled.dopr_s.keys()
    assert added == {"Σ z", "sums of z", "correction of M"}


def test_inverses_are_shared_by_owners():
    hardware = replace(H100, **FREE, fp64=1, cholesky_fraction=1, cholesky_half=0)
    whole = refresh_seconds(SMALL, Placement("ddp", 1), EXACT, hardware)["inverses"]
    assert whole == pytest.approx(7 / 3 * L * (3 + 64) * D**3)
    shared = refresh_seconds(SMALL, Placement("ddp", 8), EXACT, hardware)["inverses"]
    assert shared == pytest.approx(7 / 3 * 2 * 64 * D**3)  # 12 wide layers on 8 GPUs: some have two


@pytest.mark.parametrize("mode", [*MODES, EXACT._replace(inverse="newton_schulz")])
def test_the_memory_between_steps_equals_that_of_a_real_preconditioner(mode):
    shape = ModelShape("small", 2, 2, 128, 8, 64, 16, vocab_size=41)
    real = ActivationPreconditioner(GPT(gpt(shape).config), **mode.settings(128))
    held = dopr_bytes(shape, mode, Placement("ddp", 1))["Σ, sums, P, U, μ"]
    assert held == sum(row["bytes"] for row in real.report() if row["covered"])
    assert all(layer.sigma.device == torch.device("meta") for layer in layers(shape, mode))


def test_a_triangle_of_each_sum_and_inverse_is_sent():
    refresh = refresh_calls(SMALL, EXACT, Placement("ddp", 8), rank=0)
    assert refresh
    calls = refresh.calls
    triangles = TRIANGLE * L * (3 + 16) * D**2
    sums = sum(call.n_bytes for call in calls if call.kind == "all_reduce")
    made = sum(call.n_bytes for call in calls if call.kind == "broadcast")
    assert sums == 4 * triangles + (49 * 2 + 48 * 4) * 8
    assert made == 4 * (triangles + 48)  # and the damping of each
    assert sent_bytes(calls[0], Placement("ddp", 8)) == 2 * 7 / 8 * 49 * 2 * 8


def test_one_gpu_sends_nothing():
    one = step_of(Placement("ddp", 1))
    assert one.base_sent == one.dopr_sent == one.base_s["weights, gradients"] == 0
    assert {"sums of Σ", "P to all", "agreement"}.isdisjoint(one.dopr_s)
    assert step_of(Placement("ddp", 1), FRESH_MEAN).dopr_s["sums of z"] == 0


def test_gradients_are_multiplied_by_owners_or_where_their_rows_are():
    hardware = replace(H100, **FREE, tf32=3, apply_fraction=1)
    whole, rows, owner = (
        work.apply(SMALL, EXACT, placement, hardware)
        for placement in (
            Placement("ddp", 12),
            Placement("fsdp", 12, statistics="replicated"),
            Placement("fsdp", 12),
        )
    )
    assert whole == 48 * L * D**3
    assert rows == whole / 12
    assert owner == (32 + 3 * 8) * D**3  # one wide input, and three with the most rows


def test_sums_to_owners_share_the_network_with_the_weights():
    placement, batch = Placement("fsdp", 64), work.Batch(SMALL, 8, 1, 2**14)  # 4 micro-batches
    slow, fast = (replace(H100, network=network) for network in (1e8, 1e15))
    reduces = network.total(reduce_calls(SMALL, SAMPLED, placement), placement, slow)
    shown, hidden = (
        statistics_seconds(SMALL, placement, SAMPLED, batch, hardware, is_collecting=True)
        for hardware in (slow, fast)
    )
    assert shown == pytest.approx(4 * reduces)
    computed = work.statistics(SMALL, placement, SAMPLED, batch, fast, is_collecting=True)
    assert hidden == pytest.approx(computed)


def test_owners_invert_while_the_sums_of_other_copies_arrive():
    hsdp, fsdp = (step_of(placement) for placement in (Placement("hsdp", 64), Placement("fsdp", 8)))
    assert "sums of Σ" in hsdp.dopr_s
    assert "sums of Σ" not in fsdp.dopr_s
    both = hsdp.dopr_s["sums of Σ"] + hsdp.dopr_s["inverses"]
    assert fsdp.dopr_s["inverses"] < both < 1.1 * fsdp.dopr_s["inverses"]


@pytest.mark.parametrize("name", ["network", "cholesky_fraction", "apply_fraction", "memory_rate"])
def test_slower_hardware_takes_longer(name):
    slower = replace(H100, **{name: getattr(H100, name) / 2})
    found = [step_of(Placement("ddp", 64), EXACT, hardware) for hardware in (H100, slower)]
    fast, slow = (sum(one.base_s.values()) + sum(one.dopr_s.values()) for one in found)
    assert slow > fast


def test_memory_limits_what_fits_and_the_size_of_micro_batches():
    placement = Placement("ddp", 8)
    sizes = {"yes": 80e9, "base": 5e9, "no": 1e9}
    for fits, memory in sizes.items():
        assert step_of(placement, EXACT, replace(H100, memory=memory)).fits == fits
    placement = Placement("fsdp", 8, statistics="replicated")
    tight = step_of(placement, EXACT, replace(H100, memory=30.5e9))
    assert tight.fits == "yes"
    assert tight.dopr_bytes < tight.base_bytes  # micro-batches half as large
    assert tight.dopr_sent > step_of(placement, EXACT).dopr_sent  # more gathers
