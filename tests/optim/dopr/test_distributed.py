"""DoPr under torch.distributed, in a trainer that only calls attach()."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import distributed, nn

import optim.dopr.distributed
import optim.matrices
from optim import ActivationPreconditioner
from optim.dopr.triangles import pack, packed_numel, unpack
from optim.process_group import owners, row_bounds
from tests.optim import distributed as workers
from tests.optim.distributed import TOLERANCE, in_process_group
from tests.optim.models import mlp, randn

pytestmark = pytest.mark.xdist_group("gang")  # share one set of worker processes

EXACT, FAST = {}, {"refresh_every": 3, "collect_every": 1, "sigma_beta": 0.9}
FRESH = FAST | {"fresh_mean": True}
REPLICATED = {"statistics": "replicated"}  # test_sharded_statistics.py has the others


@pytest.mark.parametrize(
    ("size", "how", "settings", "bases"),
    [
        (4, "ddp", FAST, workers.BASES),
        (4, "fsdp", FRESH | REPLICATED, workers.FEW),
        pytest.param(4, "fsdp", FRESH | REPLICATED, workers.BASES, marks=pytest.mark.slow),
        pytest.param(4, "fsdp", FRESH, workers.BASES, marks=pytest.mark.slow),
        pytest.param(4, "fsdp", FAST, workers.BASES, marks=pytest.mark.slow),
        pytest.param(3, "ddp", FRESH, workers.BASES, marks=pytest.mark.slow),
        pytest.param(4, "hsdp", FRESH, workers.BASES, marks=pytest.mark.slow),
        pytest.param(2, "ddp", EXACT, workers.BASES, marks=pytest.mark.slow),
        pytest.param(4, "fsdp", EXACT, workers.BASES, marks=pytest.mark.slow),
        pytest.param(4, "hsdp", EXACT, workers.BASES, marks=pytest.mark.slow),
        pytest.param(4, "hsdp", FRESH | REPLICATED, workers.BASES, marks=pytest.mark.slow),
    ],
)
def test_ragged_tokens_and_empty_shards_train_as_one_process_with_all_tokens(
    gang, size, how, settings, bases
):
    workers.assert_trains_as_one_process(gang, size, how, settings, bases)


def test_the_directions_of_a_deflated_inverse_are_the_owners_in_every_process(gang):
    alone = workers.deflated("alone")
    here, there = gang.run(2, in_process_group, workers.deflated, "ddp")
    for ours, theirs in zip(here, there, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(here[1], alone[1], atol=TOLERANCE * np.abs(alone[1]).max())
    overlap = np.linalg.svd(here[0][0].T @ alone[0][0])[
        1
    ]  # the bases differ, but span the same space
    np.testing.assert_allclose(overlap, 1, atol=1e-3)


def in_messages_of_a_layer(*args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim.dopr.distributed, "MESSAGE_BYTES", 1)
        return workers.train(*args), workers.counted(*args)[0]


def test_sums_and_inverses_that_need_several_messages_are_the_same(gang):
    """One message per layer gives the same bits as one message for all layers."""
    case = ("sgd", "fsdp", 2, EXACT | REPLICATED)
    in_one_message = gang.run(2, in_process_group, workers.train, *case)
    for ((weights, *_), counts), expected in zip(
        gang.run(2, in_process_group, in_messages_of_a_layer, *case), in_one_message, strict=True
    ):
        for ours, theirs in zip(weights, expected[0], strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert counts["all_reduce"] == 5  # one more than in PLANS
        assert counts["broadcast"] == 2


def in_messages_of_eight_numbers(*args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim.matrices, "MESSAGE_BYTES", 3 * 8 * 4)  # of three processes
        return workers.train(*args), workers.counted(*args)[0]


def test_updates_that_are_gathered_in_several_messages_are_the_same(gang):
    case = ("muon", "ddp", 2, EXACT)
    in_one_message = gang.run(3, in_process_group, workers.train, *case)
    for ((weights, *_), counts), expected in zip(
        gang.run(3, in_process_group, in_messages_of_eight_numbers, *case),
        in_one_message,
        strict=True,
    ):
        for ours, theirs in zip(weights, expected[0], strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert counts["all_gather"] == 11  # 7 x 12 numbers; the third process owns no matrix


# Number of collectives in a step with a refresh and in one without, in the order of COLLECTIVES.
# A refresh reduces counts and traces, sums, and flags; each of the two owners broadcasts its P.
# Muon exchanges the rows with their owners; AdaMuon also reduces the norms of sharded rows.
PLANS = {
    ("adamw", "ddp"): ((3, 2, 0, 0, 0), (0, 0, 0, 0, 0)),
    ("adamw", "fsdp"): ((4, 2, 0, 0, 0), (0, 0, 0, 0, 0)),  # also the norms of sharded rows
    ("muon", "ddp"): ((3, 2, 1, 0, 0), (0, 0, 1, 0, 0)),
    ("muon", "fsdp"): ((4, 2, 0, 2, 0), (0, 0, 0, 2, 0)),
    ("adamuon", "fsdp"): ((5, 2, 0, 2, 0), (1, 0, 0, 2, 0)),
}


@pytest.mark.parametrize(("base", "how"), PLANS)
def test_a_step_takes_the_collectives_of_the_plan(gang, base, how):
    settings = {"refresh_every": 3, "collect_every": 3} | REPLICATED
    refresh, other = PLANS[base, how]
    for counts in gang.run(2, in_process_group, workers.counted, base, how, 4, settings):
        assert [tuple(each.values()) for each in counts] == [refresh, other, other, refresh]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_fresh_mean_takes_one_reduction_more_in_every_step(gang, how):
    settings = {"refresh_every": 3, "collect_every": 3, "fresh_mean": True} | REPLICATED
    for counts in gang.run(2, in_process_group, workers.counted, "adamw", how, 4, settings):
        refresh, other = ((n + 1, *more) for n, *more in PLANS["adamw", how])
        assert [tuple(each.values()) for each in counts] == [refresh, other, other, refresh]


@pytest.mark.parametrize(
    ("base", "how", "n_steps"),
    [
        ("muon", "ddp", 30),
        pytest.param("muon", "ddp", 100, marks=pytest.mark.slow),
        pytest.param("adamw", "ddp", 100, marks=pytest.mark.slow),
        pytest.param("adamuon", "hsdp", 100, marks=pytest.mark.slow),
    ],
)
def test_replicas_are_bit_identical_after_many_steps(gang, base, how, n_steps):
    settings = {"refresh_every": 3, "sigma_beta": 0.9}
    found = gang.run(4, in_process_group, workers.fingerprint, base, how, n_steps, settings)
    assert len({known for _, known in found}) == 1
    weights = [here for here, _ in found]
    if how == "hsdp":  # ranks 0 and 2 hold the same rows, and 1 and 3
        assert weights[:2] == weights[2:]
        assert weights[0] != weights[1]
    else:
        assert len({*weights}) == 1


def branches():
    """Make three layers. Each of two processes uses one of the first two, and both use the last."""
    model = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)])
    for i, parameter in enumerate(model.parameters()):
        parameter.data = randn(*parameter.shape, seed=i)
    return model


def branch_loss(model, rank):
    return model[2](model[rank](randn(20, 6, seed=rank))).square().mean()


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = branches()

    def forward(self, rank):
        return branch_loss(self.layers, rank)


def train_branches():
    model, rank = Branches(), distributed.get_rank()
    forward = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    for _ in range(3):
        forward(rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().numpy() for param in model.parameters()]


def test_a_layer_that_one_process_does_not_use_hangs_nothing(gang):
    model = branches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    for _ in range(3):
        ((branch_loss(model, 0) + branch_loss(model, 1)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for found in gang.run(2, in_process_group, train_branches):
        for ours, theirs in zip(found, model.parameters(), strict=True):
            np.testing.assert_allclose(ours, theirs.detach(), atol=TOLERANCE)


def step_without_input():
    """Step with the gradient of a zero input in process 1 and with no gradient in process 0."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    if distributed.get_rank() == 1:
        model(torch.zeros(4, 12)).sum().backward()
    optimizer.step()
    return [layer.n_fallbacks for layer in preconditioner.layers], preconditioner.layers[
        1
    ].n_refreshes


def test_a_gradient_that_only_one_process_has_hangs_nothing(gang):
    assert gang.run(2, in_process_group, step_without_input) == [([0, 0], 1)] * 2


def state_after(how, n_steps):
    _, forward, optimizer, preconditioner = workers.parts("adamw", how, **FAST)
    for number in range(n_steps):
        workers.step(forward, optimizer, number)
    state = preconditioner.state_dict()
    return {name: (int(each["count"]), each["gram"].numpy()) for name, each in state.items()}


@pytest.mark.parametrize(("how", "size"), [("ddp", 2), ("fsdp", 4)])
def test_a_state_holds_the_running_sums_of_all_processes(gang, how, size):
    _, forward, optimizer, preconditioner = workers.parts("adamw", "alone", **FAST)
    for number in range(5):  # two steps after the refresh at step 3
        workers.step(forward, optimizer, number)
    expected = preconditioner.state_dict()
    for found in gang.run(size, in_process_group, state_after, how, 5):
        for name, layer in expected.items():
            count, gram = found[name]
            assert count == layer["count"] == workers.N
            np.testing.assert_allclose(gram, layer["gram"], rtol=1e-4, atol=1e-4)


def loaded_sums(state):
    *_, preconditioner = workers.parts("adamw", "ddp", **FAST)
    preconditioner.load_state_dict(state)
    return [int(layer.capture.count) for layer in preconditioner.layers]


def test_loaded_sums_are_counted_once(gang):
    _, forward, optimizer, preconditioner = workers.parts("adamw", "alone", **FAST)
    for number in range(2):
        workers.step(forward, optimizer, number)
    counts = gang.run(3, in_process_group, loaded_sums, preconditioner.state_dict())
    assert counts == [[workers.N] * 2, [0, 0], [0, 0]]


@pytest.mark.parametrize(("b", "numel"), [(1, 1), (5, 15), (16, 136), (17, 161), (40, 859)])
def test_packed_matrices_come_back_exactly(b, numel):
    """Up to 16 rows, a strip is a row; of 17 rows there are 8 strips of two and one of one."""
    S = randn(3, b, b, seed=0)
    S = S + S.mT
    assert packed_numel(S.shape) == pack(S).numel() == 3 * numel
    assert torch.equal(unpack(pack(S), S.shape), S)
    assert torch.equal(unpack(pack(S[0, 0]), S[0, 0].shape), S[0, 0])


@pytest.mark.parametrize(("n_rows", "size"), [(7, 4), (5, 4), (1, 3), (8, 2), (3, 1)])
def test_rows_are_cut_as_torch_cuts_them(n_rows, size):
    sizes = [len(each) for each in torch.arange(n_rows).chunk(size)]
    found = [b - a for a, b in pairwise(row_bounds(n_rows, size))]
    assert found == sizes + [0] * (size - len(sizes))


def test_owners_share_the_work_evenly():
    costs = [768.0**3] * 36 + [3072.0**3] * 12  # GPT-2 124M
    owner = owners(costs, 8)
    loads = [sum(c for c, o in zip(costs, owner, strict=True) if o == rank) for rank in range(8)]
    assert max(loads) == 2 * 3072.0**3  # 12 large layers on 8 processes: at most two each
    assert sum(loads) == sum(costs)
