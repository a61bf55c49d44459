"""Statistics that one process per layer holds: the same numbers, in less memory."""

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.profiler import ProfilerActivity, profile
from transformers.pytorch_utils import Conv1D

import optim.dopr.exchange
import optim.dopr.refresh
from optim import ActivationPreconditioner
from tests.optim import distributed as workers
from tests.optim.distributed import TOLERANCE, full_tensor, in_process_group, message_of
from tests.optim.models import backward, mlp, randn, regression

pytestmark = pytest.mark.xdist_group("gang")  # share one set of worker processes

SETTINGS = {
    "exact": {},
    "fast": {"refresh_every": 3, "sigma_beta": 0.9},
    "fresh mean": {"refresh_every": 3, "sigma_beta": 0.9, "fresh_mean": True},
    "blocks, deflated": {"block_diagonal": 6, "inverse": "newton_schulz"},
}


FAST_CASES = [(3, "ddp", "fresh mean"), (2, "fsdp", "blocks, deflated"), (4, "hsdp", "fresh mean")]
SLOW_CASES = [
    *FAST_CASES,
    *((2, "ddp", "exact"), (4, "hsdp", "exact"), (3, "fsdp", "exact")),
    *((4, "ddp", "fast"), (2, "hsdp", "fast"), (4, "hsdp", "blocks, deflated")),
]


@pytest.mark.parametrize(
    ("size", "how", "mode", "bases"),
    [
        *((*case, workers.FEW) for case in FAST_CASES),
        *(pytest.param(*case, workers.BASES, marks=pytest.mark.slow) for case in SLOW_CASES),
    ],
)
def test_sharded_statistics_train_as_one_process(gang, size, how, mode, bases):
    settings = SETTINGS[mode] | {"statistics": "sharded"}
    workers.assert_trains_as_one_process(gang, size, how, settings, bases)


def final_weights(how, statistics):
    return workers.train("muon", how, 4, SETTINGS["fresh mean"] | {"statistics": statistics})[0]


def test_sharded_and_replicated_statistics_of_the_same_sums_agree(gang):
    """Two processes: a sum has one order only, so that just the products differ in rounding."""
    sharded = gang.run(2, in_process_group, final_weights, "fsdp", "sharded")
    replicated = gang.run(2, in_process_group, final_weights, "fsdp", "replicated")
    for ours, theirs in zip(sharded[0], replicated[0], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


WIDTH, DEPTH, TOKENS = 96, 8, 64


def stack(how, statistics):
    """Return a stack of layers of one width, sharded over all processes, and what trains it."""
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)])
    forward = workers.sharded(model, "fsdp") if how == "fsdp" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    preconditioner = ActivationPreconditioner(
        model, gamma=0.1, refresh_every=2, collect_every=1, statistics=statistics
    ).attach(optimizer)
    return forward, optimizer, preconditioner


def tensors_of(preconditioner):
    """Return everything that the layers hold between steps."""
    return [
        each
        for layer in preconditioner.layers
        for each in (layer.sigma, layer.P, layer.capture.gram, layer.damping)
    ]


def memory(how, statistics):
    """Return the bytes of statistics after steps with and without a refresh, and the peak of one.

    The peak is the most that a step with a refresh adds to its start.
    """
    forward, optimizer, preconditioner = stack(how, statistics)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim.dopr.refresh, "CHUNK_BYTES", 1)  # one layer at a time
        patch.setattr(optim.dopr.exchange, "CHUNK_BYTES", 1)
        kept = []
        for number in range(3):  # the first and the last step refresh
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
                forward(randn(TOKENS, WIDTH, seed=number)).square().sum().backward()
                optimizer.step()
            optimizer.zero_grad()
            held = tensors_of(preconditioner)
            kept.append(sum(each.untyped_storage().nbytes() for each in held))
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return kept[2], kept[1], int(np.cumsum(changes).max())


def test_memory_is_bounded_by_what_a_process_owns(gang):
    """See `memory.py` of bench/scale for the same bounds at any size."""
    size, sigma = 4, 4 * WIDTH**2  # bytes of Σ in fp32
    n_own = DEPTH // size
    found = gang.run(size, in_process_group, memory, "fsdp", "sharded")
    whole, _, peak_whole = gang.run(size, in_process_group, memory, "fsdp", "replicated")[0]
    assert whole == 3 * DEPTH * sigma + 4 * DEPTH  # 4: γ̄
    for after_refresh, between, peak in found:
        assert after_refresh == 2 * n_own * sigma + 4 * n_own  # a refresh frees the sums
        assert between == 3 * n_own * sigma + 4 * n_own
        # 9 copies to invert one Σ, a second P of each own layer, and what FSDP2 itself needs
        assert peak < (9 + n_own + 5) * sigma
    assert peak_whole > max(peak for *_, peak in found) + (DEPTH - n_own) * sigma


PLANS = {  # numbers of all_reduce, broadcast, all_gather, all_to_all, reduce: refresh, other step
    # Counts and traces, flags, norms of sharded rows; the owners' sums with HSDP; rows there and
    # back; two layers in two micro-batches send their sums in the backward.
    ("adamw", "fsdp"): ((3, 0, 0, 2, 4), (0, 0, 0, 2, 0)),
    ("muon", "fsdp"): ((3, 0, 0, 4, 4), (0, 0, 0, 4, 0)),
    ("adamw", "ddp"): ((2, 0, 1, 0, 4), (0, 0, 1, 0, 0)),
}


@pytest.mark.parametrize(("base", "how"), PLANS)
def test_a_step_takes_the_collectives_of_the_plan(gang, base, how):
    settings = {"refresh_every": 3, "collect_every": 3, "statistics": "sharded"}
    refresh, other = PLANS[base, how]
    for counts in gang.run(2, in_process_group, workers.counted, base, how, 4, settings):
        assert [tuple(each.values()) for each in counts] == [refresh, other, other, refresh]


def bf16_state():
    """Return the dtypes of the norm ratios after a step of a model in bf16, whose state loads."""
    model = mlp(**workers.WIDTHS).bfloat16()
    forward = workers.sharded(model, "fsdp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    forward(regression(0)[0].bfloat16()).square().sum().backward()
    optimizer.step()
    preconditioner.load_state_dict(preconditioner.state_dict())
    return [str(layer.norm_ratio.dtype) for layer in preconditioner.layers]


def test_the_state_of_a_model_in_bf16_loads(gang):
    assert gang.run(2, in_process_group, bf16_state) == [["torch.float32"] * 2] * 2


GATHER = ("all", "first", "none")


def states(how):
    """Return, for each of GATHER, which tensors this process gets, and the state's numbers.

    Also return which tensors are its own, and the number of collectives.
    """
    _, forward, optimizer, preconditioner = workers.parts("adamw", how, **SETTINGS["fast"])
    for number in range(5):  # two steps after the refresh at step 3
        workers.step(forward, optimizer, number)
    is_held = [layer.is_held for layer in preconditioner.layers]
    counts, found = [], []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("broadcast", "all_gather"):
            original = getattr(distributed, name)
            patch.setattr(distributed, name, workers.counting(name, original, counts))
        for gather in GATHER:
            counts.append({"broadcast": 0, "all_gather": 0})
            layers = preconditioner.state_dict(gather=gather).values()
            here = [not each["sigma"].is_meta for each in layers]
            sizes = [(tuple(each["gram"].shape), int(each["count"])) for each in layers]
            grams = [None if each["gram"].is_meta else each["gram"].numpy() for each in layers]
            found.append((here, is_held, sizes, grams, counts[-1]))
    return found


@pytest.mark.parametrize("how", ["fsdp", "hsdp"])
def test_a_state_is_gathered_only_where_it_is_wanted(gang, how):
    _, forward, optimizer, preconditioner = workers.parts("adamw", "alone", **SETTINGS["fast"])
    for number in range(5):
        workers.step(forward, optimizer, number)
    expected = preconditioner.state_dict().values()
    processes = gang.run(4, in_process_group, states, how)
    for rank, found in enumerate(processes):
        for gather, (here, is_held, sizes, grams, counts) in zip(GATHER, found, strict=True):
            wanted = {"all": [True] * 2, "first": [rank == 0] * 2, "none": is_held}[gather]
            assert here == wanted
            assert sizes == [(tuple(each["gram"].shape), workers.N) for each in expected]
            for ours, theirs in zip(grams, expected, strict=True):
                if ours is not None:
                    np.testing.assert_allclose(ours, theirs["gram"], rtol=1e-4, atol=1e-4)
            if gather == "none":
                assert counts == {"broadcast": 0, "all_gather": 0}
    owners = [is_held for (_, is_held, *_), *_ in processes]
    assert [sum(each) for each in zip(*owners, strict=True)] == [1 if how == "fsdp" else 2] * 2


def resumed(how, state, n_steps):
    """Load a state and take more steps; return Σ of all layers."""
    _, forward, optimizer, preconditioner = workers.parts("sgd", how, **SETTINGS["fast"])
    preconditioner.load_state_dict(state)
    for number in range(n_steps):
        workers.step(forward, optimizer, 5 + number)
    return [layer["sigma"].numpy() for layer in preconditioner.state_dict().values()]


@pytest.mark.parametrize("how", ["fsdp", "hsdp"])
def test_running_sums_that_were_loaded_are_counted_once(gang, how):
    _, forward, optimizer, preconditioner = workers.parts("sgd", "alone", **SETTINGS["fast"])
    for number in range(5):
        workers.step(forward, optimizer, number)
    state = preconditioner.state_dict()
    expected = resumed("alone", state, 2)
    for found in gang.run(4, in_process_group, resumed, how, state, 2):
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def load_broken(how):
    *_, preconditioner = workers.parts("sgd", how)
    state = preconditioner.state_dict()
    state["2"]["sigma"] = state["2"]["sigma"].fill_(torch.nan)  # one process reads it
    return message_of(preconditioner.load_state_dict, state)


def test_a_state_that_its_owner_refuses_is_refused_by_all(gang):
    messages = gang.run(3, in_process_group, load_broken, "fsdp")
    assert sum("2: sigma is not finite" in message for message in messages) == 1
    assert sum("another process found what is wrong" in message for message in messages) == 2


def backward_before_attach():
    model = mlp()
    ActivationPreconditioner(model, gamma=0.1, statistics="sharded")
    return message_of(backward, model)


def sharded_in_part():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = mlp()
    fully_shard(model[0], mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    automatic = ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    is_held = [layer.is_held for layer in automatic.layers]
    automatic.detach()
    explicit = ActivationPreconditioner(model, gamma=0.1, statistics="sharded")
    return is_held, message_of(explicit.attach, optimizer)


def test_refusals_name_the_cure(gang):
    for message in gang.run(2, in_process_group, backward_before_attach):
        assert "2: a backward ran before attach()" in message
        assert "use statistics='replicated'" in message
    for is_held, message in gang.run(2, in_process_group, sharded_in_part):
        assert is_held == [True, True]
        assert "sharded over different processes; use statistics='replicated'" in message


def test_one_process_holds_everything():
    plain, sharded = (
        workers.train("adamw", "alone", 4, {"statistics": each}) for each in ("auto", "sharded")
    )
    for ours, theirs in zip(plain[0], sharded[0], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def conv1d_weights(how):
    """Train a layer whose weight is (d_in, d_out), each process on a part of the tokens."""
    model = nn.Sequential(Conv1D(9, 12), nn.Tanh(), Conv1D(5, 9))
    for i, parameter in enumerate(model.parameters()):
        parameter.data = 0.4 * randn(*parameter.shape, seed=i)
    size, rank = 1, 0
    if how != "alone":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
        size, rank = distributed.get_world_size(), distributed.get_rank()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    statistics = "auto" if how == "alone" else how
    ActivationPreconditioner(model, gamma=0.1, statistics=statistics).attach(optimizer)
    for number in range(3):
        x, target = (each.chunk(size)[rank] for each in regression(number, 60))
        ((model(x) - target).square().sum() / 60 * size).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [full_tensor(parameter).numpy() for parameter in model.parameters()]


@pytest.mark.parametrize("statistics", ["sharded", "replicated"])
def test_sharded_rows_of_a_conv1d_go_to_one_process(gang, statistics):
    expected = conv1d_weights("alone")
    for found in gang.run(2, in_process_group, conv1d_weights, statistics):
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def with_paused_backwards(how):
    """Return the weights after steps in which another backward of each is thrown away."""
    model, forward, optimizer, preconditioner = workers.parts("sgd", how, **SETTINGS["fresh mean"])
    for number in range(3):
        x, target = regression(number, 32)
        with preconditioner.paused():
            (5 * forward(x)).square().sum().backward()
        optimizer.zero_grad()
        (forward(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [full_tensor(parameter).numpy() for parameter in model.parameters()]


def test_paused_backwards_send_nothing(gang):
    expected = with_paused_backwards("alone")
    for found in gang.run(2, in_process_group, with_paused_backwards, "fsdp"):
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def after_discard():
    """Return Σ when a step was discarded while its last sum was still on its way."""
    _, forward, optimizer, preconditioner = workers.parts("sgd", "fsdp")
    forward(regression(9)[0]).sum().backward()
    optimizer.zero_grad()
    preconditioner.discard()
    workers.step(forward, optimizer, 0)
    return [layer["sigma"].numpy() for layer in preconditioner.state_dict().values()]


def test_a_discarded_backward_leaves_nothing_behind(gang):
    _, expected, _ = workers.train("sgd", "alone", 1, {})
    for found in gang.run(4, in_process_group, after_discard):
        for ours, (theirs, _) in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


class WithEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.linear = nn.Embedding(11, 12), nn.Linear(12, 12)
        for i, parameter in enumerate(self.parameters()):
            parameter.data = randn(*parameter.shape, seed=i)

    def forward(self, ids):
        return self.linear(self.wte(ids))


def between_backward_and_step(gather):
    """Return the sum and the count of the linear layer, then and after one more backward."""
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(WithEmbedding())
    preconditioner = ActivationPreconditioner(model, gamma=0.1, embeddings=True)
    preconditioner.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    ids = torch.arange(8) + distributed.get_rank()
    model(ids).square().sum().backward()
    state = preconditioner.state_dict(gather=gather)["linear"]
    before = None if state["gram"].is_meta else state["gram"].clone()
    model(ids).square().sum().backward()
    preconditioner.layers[-1].capture.finish()
    is_kept = before is None or torch.equal(state["gram"], before)
    return before if before is None else before.numpy(), int(state["count"]), is_kept


@pytest.mark.parametrize("gather", ["all", "none"])
def test_a_state_between_backward_and_step_has_the_sums_on_their_way(gang, gather):
    model = WithEmbedding()
    z = torch.cat([model.wte(torch.arange(8) + rank) for rank in range(2)])
    found = gang.run(2, in_process_group, between_backward_and_step, gather)
    grams = [gram for gram, _, _ in found if gram is not None]
    assert len(grams) == (2 if gather == "all" else 1)
    for gram in grams:
        np.testing.assert_allclose(gram[0], (z.T @ z).detach(), rtol=1e-5, atol=1e-5)
    assert [(count, is_kept) for _, count, is_kept in found] == [(16, True)] * 2


def through_torch_checkpoint(folder):
    """Save and load only what each process holds; return whether it came back, and Σ of all."""
    from torch.distributed import checkpoint

    _, forward, optimizer, preconditioner = workers.parts("sgd", "hsdp", **SETTINGS["fast"])
    *_, fresh = workers.parts("sgd", "hsdp", **SETTINGS["fast"])
    for number in range(5):
        workers.step(forward, optimizer, number)

    def own(preconditioner):
        return {
            name: {key: x for key, x in layer.items() if not getattr(x, "is_meta", False)}
            for name, layer in preconditioner.state_dict(gather="none").items()
        }

    checkpoint.save({"dopr": own(preconditioner)}, checkpoint_id=folder)
    state = {"dopr": own(fresh)}
    checkpoint.load(state, checkpoint_id=folder)
    fresh.load_state_dict(state["dopr"])
    return [
        [(layer["sigma"].numpy(), layer["gram"].numpy(), int(layer["count"]), layer["step"])]
        for each in (preconditioner, fresh)
        for layer in each.state_dict().values()
    ]


def test_torch_checkpoints_hold_what_each_process_holds(gang, tmp_path):
    for layers in gang.run(4, in_process_group, through_torch_checkpoint, str(tmp_path)):
        saved, loaded = layers[:2], layers[2:]
        for ours, theirs in zip(loaded, saved, strict=True):
            for a, b in zip(ours[0], theirs[0], strict=True):
                np.testing.assert_array_equal(a, b)


def attached_again():
    """Return Σ of a step whose preconditioner saw tokens before the processes were started."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = ActivationPreconditioner(model, gamma=0.1, statistics="sharded")
    preconditioner.attach(optimizer)
    backward(model, step=3)
    optimizer.zero_grad()
    return in_process_group(step_of, model, optimizer, preconditioner)


def step_of(model, optimizer, preconditioner):
    preconditioner.attach(optimizer)
    backward(model)
    optimizer.step()
    return [layer["sigma"].numpy() for layer in preconditioner.state_dict().values()]


def test_attaching_again_drops_the_tokens_seen_before(gang):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alone = ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    backward(model)
    optimizer.step()
    for found in gang.run(2, attached_again):
        for ours, layer in zip(found, alone.layers, strict=True):
            np.testing.assert_allclose(ours, layer.sigma, rtol=1e-5, atol=1e-6)


class Experts(nn.Module):
    """Layers of one shape, of which each process uses another one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])

    def forward(self, x, expert):
        return self.layers[expert](x)


def other_experts():
    """Let the processes use two experts that the same process owns."""
    model, rank = Experts(), distributed.get_rank()
    forward = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sharded = ActivationPreconditioner(model, gamma=0.1, statistics="sharded").attach(optimizer)
    same_owner = [i for i, layer in enumerate(sharded.layers) if layer.owner == 0]
    forward(randn(20, 6, seed=rank), same_owner[rank]).square().sum().backward()
    return message_of(optimizer.step)


def test_sums_of_different_layers_are_not_added_silently(gang):
    for message in gang.run(2, in_process_group, other_experts):
        assert "RuntimeError: the processes ran backward passes through other layers" in message
        assert "use statistics='replicated'" in message


def wrong_gather():
    *_, preconditioner = workers.parts("sgd", "fsdp")
    return message_of(preconditioner.state_dict, gather="frist")


def test_gather_is_one_of_three(gang):
    for message in gang.run(2, in_process_group, wrong_gather):
        assert message == "ValueError: gather='frist': must be one of all, first, none"


class Branching(nn.Module):
    """Layers whose order in the backward the compiler may choose."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.q, self.v = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x))) + torch.tanh(self.q(x)) * self.v(x)


def compiled(is_compiled):
    """Train on batches that are larger in one process; return the weights."""
    model = nn.Sequential(nn.Linear(6, 8), Branching(), Branching(), nn.Linear(8, 3))
    for i, parameter in enumerate(model.parameters()):
        parameter.data = 0.4 * randn(*parameter.shape, seed=i)
    size, rank = 1, 0
    if distributed.is_initialized():
        from torch.distributed.fsdp import fully_shard

        size, rank = 2, distributed.get_rank()
        for block in model[1:3]:
            fully_shard(block)
        fully_shard(model)
    if is_compiled:
        for block in model[1:3]:
            block.compile()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    for number in range(3):
        x = randn(13, 6, seed=number)
        rows = x.split([3, 10])[rank] if size == 2 else x
        (model(rows).square().sum() / 13 * size).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = [full_tensor(parameter).numpy() for parameter in model.parameters()]
    preconditioner.detach()
    model(rows).sum().backward()  # compiled code still calls the operator, which does nothing
    return weights


@pytest.mark.slow
def test_compiled_backwards_send_their_sums_in_one_order(gang):
    """Torch compiles other orders for other sizes, if nothing forbids it."""
    expected = compiled(False)
    for found in gang.run(2, in_process_group, compiled, True):
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
