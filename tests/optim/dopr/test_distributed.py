"""DoPr in the trainers of others under torch.distributed: attach, and nothing else."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import distributed, nn

from optim import ActivationPreconditioner
from optim.dopr import distributed as reduction
from optim.dopr.distributed import pack, unpack
from optim.process_group import owners, row_bounds
from tests.optim import distributed as workers
from tests.optim.distributed import grouped, message_of
from tests.optim.models import backward, mlp, randn

pytestmark = pytest.mark.xdist_group("gang")  # one gang of processes for all of them

TOLERANCE = 1e-5  # fp32 sums in another order, amplified by the condition number of Σ
EXACT, FAST = {}, {"refresh_every": 3, "collect_every": 1, "sigma_beta": 0.9}


@pytest.mark.parametrize(
    ("size", "how", "settings"),
    [
        *((4, "ddp", FAST), (4, "fsdp", FAST)),
        pytest.param(2, "ddp", EXACT, marks=pytest.mark.slow),
        pytest.param(4, "fsdp", EXACT, marks=pytest.mark.slow),
        pytest.param(4, "hsdp", EXACT, marks=pytest.mark.slow),
    ],
)
def test_ragged_tokens_and_empty_shards_train_as_one_process_with_all_tokens(
    gang, size, how, settings
):
    for base in workers.BASES:
        weights, layers, ratios = workers.train(base, "alone", 5, settings)
        for found in gang.run(size, grouped, workers.train, base, how, 5, settings):
            for ours, theirs in zip(found[0], weights, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, err_msg=base)
            for ours, theirs in zip(found[1], layers, strict=True):
                np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
            assert found[2] == pytest.approx(ratios, rel=1e-4)


def test_the_directions_of_a_deflated_inverse_are_the_owners_in_every_process(gang):
    alone = workers.deflated("alone")
    here, there = gang.run(2, grouped, workers.deflated, "ddp")
    for ours, theirs in zip(here, there, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(here[1], alone[1], atol=TOLERANCE * np.abs(alone[1]).max())
    overlap = np.linalg.svd(here[0][0].T @ alone[0][0])[1]  # the same space, whatever its basis
    np.testing.assert_allclose(overlap, 1, atol=1e-3)


def in_messages_of_a_layer(*args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction, "MESSAGE_BYTES", 1)
        return workers.train(*args), workers.counted(*args)[0]


def test_sums_and_inverses_that_need_several_messages_are_the_same(gang):
    """GPT-2 124M needs three: a layer for each here, as in one message for all."""
    case = ("sgd", "fsdp", 2, EXACT)
    raise_on_all_ranks = gang.run(2, grouped, workers.train, *case)
    for ((weights, *_), counts), wanted in zip(
        gang.run(2, grouped, in_messages_of_a_layer, *case), raise_on_all_ranks, strict=True
    ):
        for ours, theirs in zip(weights, wanted[0], strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert counts["all_reduce"] == 5  # one more than in PLANS
        assert counts["broadcast"] == 2


# A refresh: counts and traces; sums; what went wrong; a message from each of two owners of layers.
# Muon: the rows to the owners and back; AdaMuon: also the norms of spread rows.
PLANS = {
    ("adamw", "ddp"): ((3, 2, 0, 0), (0, 0, 0, 0)),
    ("adamw", "fsdp"): ((4, 2, 0, 0), (0, 0, 0, 0)),  # ‖M‖ and ‖G‖ of spread rows
    ("muon", "ddp"): ((3, 2, 1, 0), (0, 0, 1, 0)),
    ("muon", "fsdp"): ((4, 2, 0, 2), (0, 0, 0, 2)),
    ("adamuon", "fsdp"): ((5, 2, 0, 2), (1, 0, 0, 2)),
}


@pytest.mark.parametrize(("base", "how"), PLANS)
def test_a_step_takes_the_collectives_of_the_plan(gang, base, how):
    settings = {"refresh_every": 3, "collect_every": 3}
    refresh, other = PLANS[base, how]
    for counts in gang.run(2, grouped, workers.counted, base, how, 4, settings):
        assert [tuple(each.values()) for each in counts] == [refresh, other, other, refresh]


@pytest.mark.parametrize(
    ("base", "how"),
    [
        ("muon", "ddp"),
        pytest.param("adamw", "ddp", marks=pytest.mark.slow),
        pytest.param("adamuon", "hsdp", marks=pytest.mark.slow),
    ],
)
def test_replicas_are_bit_identical_after_a_hundred_steps(gang, base, how):
    settings = {"refresh_every": 3, "sigma_beta": 0.9}
    found = gang.run(4, grouped, workers.fingerprint, base, how, 100, settings)
    assert len({known for _, known in found}) == 1
    weights = [here for here, _ in found]
    if how == "hsdp":  # ranks 0 and 2 hold the same rows, and 1 and 3
        assert weights[:2] == weights[2:]
        assert weights[0] != weights[1]
    else:
        assert len({*weights}) == 1


def branches():
    """Each of two processes uses one of two layers, and both the last."""
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
    for found in gang.run(2, grouped, train_branches):
        for ours, theirs in zip(found, model.parameters(), strict=True):
            np.testing.assert_allclose(ours, theirs.detach(), atol=TOLERANCE)


def step_without_input():
    """One process has a gradient of zero input, the other none, and nobody averages them."""
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
    assert gang.run(2, grouped, step_without_input) == [([0, 0], 1)] * 2


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
    wanted = preconditioner.state_dict()
    for found in gang.run(size, grouped, state_after, how, 5):
        for name, layer in wanted.items():
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
    counts = gang.run(3, grouped, loaded_sums, preconditioner.state_dict())
    assert counts == [[workers.N] * 2, [0, 0], [0, 0]]


def with_columns_spread():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = mlp()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(1)]))
    ActivationPreconditioner(model, gamma=0.1).attach(torch.optim.AdamW(model.parameters()))


def test_columns_that_are_spread_over_processes_are_refused(gang):
    for message in gang.run(2, grouped, message_of, with_columns_spread):
        assert "0.weight cannot be preconditioned" in message
        assert "Shard(1)" in message


def with_other_layers():
    exclude = ["0"] if distributed.get_rank() == 1 else None
    model = mlp()
    preconditioner = ActivationPreconditioner(model, gamma=0.1, exclude=exclude)
    preconditioner.attach(torch.optim.AdamW(model.parameters()))


def test_processes_that_cover_other_layers_are_refused_in_all(gang):
    for message in gang.run(3, grouped, message_of, with_other_layers):
        assert "preconditions other layers" in message


def attached_too_early():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    backward(model)
    return grouped(message_of, optimizer.step)


def test_an_attach_before_the_process_group_is_noticed(gang):
    for message in gang.run(2, attached_too_early):
        assert "initialised after attach" in message


def with_a_broken_sum(last_P):
    """In the second step, or the first, one process sees an activation that is not finite."""
    model, _, optimizer, preconditioner = workers.parts("sgd", "ddp")
    for number in range(2 if last_P else 1):
        x = randn(10, 12, seed=number)
        if distributed.get_rank() == 1 and number == last_P:
            x[3, 4] = torch.inf
        model(x)[:, 0].nan_to_num(0, 0, 0).sum().backward()
        for parameter in model.parameters():
            parameter.grad.zero_()
        optimizer.step()
        optimizer.zero_grad()
    return preconditioner.layers[0].n_fallbacks, workers.digest([preconditioner.layers[0].P])


def test_an_activation_that_is_not_finite_in_one_process_is_one_in_all(gang):
    for message in gang.run(2, grouped, message_of, with_a_broken_sum, False):
        assert "FloatingPointError: the first activations seen by 0" in message
    found = gang.run(2, grouped, with_a_broken_sum, True)
    assert found[0] == found[1]
    assert found[0][0] == 1


def with_an_owner_that_cannot_invert():
    from optim.dopr import refresh

    def no_inverse(*args):
        raise FloatingPointError("no inverse")

    _, forward, optimizer, preconditioner = workers.parts("sgd", "ddp")
    with pytest.MonkeyPatch.context() as patch:
        if distributed.get_rank() == 1:
            patch.setattr(refresh, "_invert", no_inverse)
        message = message_of(workers.step, forward, optimizer, 0)
    return message, sum(layer.n_refreshes for layer in preconditioner.layers)


def test_an_inverse_that_fails_in_its_owner_fails_in_all_and_changes_nothing(gang):
    for message, n_refreshes in gang.run(2, grouped, with_an_owner_that_cannot_invert):
        assert "FloatingPointError" in message
        assert n_refreshes == 0


def test_packed_matrices_come_back_exactly():
    S = randn(3, 5, 5, seed=0)
    S = S + S.mT
    assert pack(S).shape == (45,)
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
    assert max(loads) == 2 * 3072.0**3  # 12 large ones on 8 processes: two for some, and no more
    assert sum(loads) == sum(costs)
