"""Apply torch's generic optimizer tests to our optimizers.

The tests themselves are not in torch's wheel, but their tools are: OptimizerInfo, OptimizerInput,
the error inputs for all optimizers, the schedulers and TensorTracker. torch.optim.Muon runs through
the same tests as a control.
"""

import copy
import io
import pickle

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    TensorTracker,
    get_error_inputs_for_all_optims,
    optim_db,
)
from torch.testing._internal.common_utils import TestCase

from optim.adamuon import AdaMuon
from optim.muon import Muon
from optim.signum import Signum


def inputs_with(*own: dict):
    """Return a generator of optimizer inputs: torch's common settings and `own`."""
    shared = [{}, {"lr": 0.01}, {"lr": torch.tensor(0.001)}, {"weight_decay": 0.2}]
    settings = [*shared, {"momentum": 0.8}, *own]
    return lambda device, dtype=None: [
        OptimizerInput(None, kwargs, str(kwargs)) for kwargs in settings
    ]


INFO_OF = {info.optim_cls: info for info in optim_db}
CONTROL, SGD = INFO_OF[torch.optim.Muon], INFO_OF[torch.optim.SGD]  # SGD provides many schedulers
NEWTON_SCHULZ = ({"ns_steps": 6, "ns_dtype": "float32"}, {"ns_coefficients": "quintic"})
OURS = [
    OptimizerInfo(
        cls, optim_inputs_func=inputs_with(*own), supported_impls=(), supports_complex=False
    )
    for cls, own in (
        (Signum, ()),
        (Muon, ({"adjust_lr": "unit_rms_norm", "nesterov": False}, *NEWTON_SCHULZ)),
        (AdaMuon, ({"eps": 1e-6, "nesterov": False}, *NEWTON_SCHULZ)),
    )
]
INFOS = [*OURS, CONTROL]
CASES = [(info, case) for info in INFOS for case in info.optim_inputs_func("cpu")]
ids = [f"{info.optim_cls.__module__}.{info.name}-{case.desc}" for info, case in CASES]
every_case = pytest.mark.parametrize(("info", "case"), CASES, ids=ids)
every_optimizer = pytest.mark.parametrize("info", INFOS, ids=lambda i: f"{i.optim_cls.__module__}")


def problem(info, case, groups=None):
    """Return the matrices of a least-squares problem, its optimizer and the closure of a step."""
    generator = torch.Generator().manual_seed(0)
    A, B, x = (torch.randn(n, m, generator=generator) for n, m in ((6, 5), (4, 6), (5, 8)))
    params = [torch.nn.Parameter(A), torch.nn.Parameter(B)]
    named = groups(params) if groups else params
    optimizer = info.optim_cls(named, **copy.deepcopy(case.kwargs))

    def closure():
        optimizer.zero_grad()
        loss = (params[1] @ params[0] @ x - 1).square().mean()
        loss.backward()
        return loss

    return params, optimizer, closure


def assert_same(ours, theirs) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@every_case
def test_the_loss_goes_down(info, case):
    _, optimizer, closure = problem(info, case)
    first = closure().item()
    for _ in range(20):
        optimizer.step(closure)
    assert closure().item() < first


@pytest.mark.parametrize("schedulers", [*CONTROL.scheduler_inputs, *SGD.scheduler_inputs])
@every_optimizer
def test_works_with_torchs_schedulers(info, schedulers):
    _, optimizer, closure = problem(info, info.optim_inputs_func("cpu")[1])
    first, attached = closure().item(), [make(optimizer) for make in schedulers]
    for _ in range(20):
        loss = optimizer.step(closure)
        for scheduler in attached:
            needs_loss = isinstance(scheduler, ReduceLROnPlateau)
            scheduler.step(*[loss.item()] * needs_loss)
    assert closure().item() < first


@every_optimizer
def test_a_tensor_lr_equals_a_float_lr(info):
    inputs = [OptimizerInput(None, {"lr": lr}) for lr in (0.125, torch.tensor(0.125))]
    tracker = TensorTracker({"rtol": 0, "atol": 0})
    for case in inputs:
        params, optimizer, closure = problem(info, case)
        for _ in range(3):
            optimizer.step(closure)
            for param in params:
                tracker.pop_check_set(param, TestCase()) if case is inputs[1] else tracker.add(
                    param
                )
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)


@every_case
def test_a_saved_state_continues_bit_for_bit(info, case):
    params, optimizer, closure = problem(info, case)
    twins, twin, twin_closure = problem(info, case)
    for _ in range(3):
        optimizer.step(closure)
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    twin.load_state_dict(torch.load(stream, weights_only=True))
    with torch.no_grad():
        for ours, theirs in zip(twins, params, strict=True):
            ours.copy_(theirs)
    for _ in range(3):
        optimizer.step(closure)
        twin.step(twin_closure)
    assert_same(twins, params)


@every_case
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_has_the_same_state_and_all_public_attributes(info, case, copied):
    _, optimizer, closure = problem(info, case)
    optimizer.step(closure)
    twin = copied(optimizer)
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert public <= set(vars(twin))
    for ours, theirs in zip(twin.state.values(), optimizer.state.values(), strict=True):
        assert_same(ours.values(), theirs.values())


@every_optimizer
def test_names_of_parameters_pass_through_the_state(info):
    def groups(params):
        return [("A", params[0]), ("B", params[1])]

    _, optimizer, _ = problem(info, OptimizerInput(None, {}), groups)
    _, twin, _ = problem(info, OptimizerInput(None, {}), groups)
    twin.load_state_dict(optimizer.state_dict())
    assert twin.state_dict()["param_groups"][0]["param_names"] == ["A", "B"]


@every_optimizer
def test_hooks_run_around_step_and_state_dict(info):
    _, optimizer, closure = problem(info, OptimizerInput(None, {}))
    called = []
    for event in ("step_pre", "step_post", "state_dict_pre", "load_state_dict_pre"):
        register = getattr(optimizer, f"register_{event}_hook")
        register(lambda *_, event=event: called.append(event))
    optimizer.step(closure)
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == ["step_pre", "step_post", "state_dict_pre", "load_state_dict_pre"]


@every_case
def test_gradients_are_not_changed(info, case):
    params, optimizer, closure = problem(info, case)
    for _ in range(2):
        closure()
        before = [param.grad.clone() for param in params]
        optimizer.step()
        assert_same([param.grad for param in params], before)


@every_case
def test_a_step_without_gradients_changes_nothing(info, case):
    params, optimizer, _ = problem(info, case)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert_same(params, before)


@every_optimizer
def test_a_group_has_its_own_rate(info):
    def groups(params):
        return [{"params": params[:1]}, {"params": params[1:], "lr": 0.0}]

    params, optimizer, closure = problem(info, OptimizerInput(None, {"lr": 0.1}), groups)
    before = [param.detach().clone() for param in params]
    optimizer.step(closure)
    assert not torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1])


@every_optimizer
@pytest.mark.parametrize(
    "wrong", get_error_inputs_for_all_optims("cpu", torch.float32), ids=lambda w: "error"
)
def test_torchs_error_inputs_raise_torchs_errors(info, wrong):
    case = wrong.optimizer_error_input
    params = [torch.nn.Parameter(torch.randn(2, 3))] if case.params is None else case.params
    assert wrong.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    if wrong.error_type is UserWarning:
        with pytest.warns(UserWarning, match=wrong.error_regex):
            info.optim_cls(params, **case.kwargs)
    else:
        with pytest.raises(wrong.error_type, match=wrong.error_regex):
            info.optim_cls(params, **case.kwargs)
