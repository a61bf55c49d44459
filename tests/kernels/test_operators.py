"""kernels/operators.py: an operator where torch traces, and a plain call elsewhere."""

from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from optim.kernels.gram import accumulate_gram
from optim.kernels.token_counts import accumulate_token_counts


class Names(TorchDispatchMode):
    """Record the names of our operators."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dopr":
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def gram_arguments():
    """Return S, count, z, offset, skips, stride; the same numbers in every call."""
    z = torch.arange(24.0).view(2, 3, 4)
    count, offset = (torch.zeros((), dtype=torch.int64) for _ in range(2))
    return torch.zeros(1, 4, 4), count, z, offset, torch.tensor(False), 1


def test_a_dispatch_mode_sees_the_operator_and_its_sums_are_those_of_the_call():
    called, dispatched = gram_arguments(), gram_arguments()
    accumulate_gram(*called)
    with Names() as names:
        accumulate_gram(*dispatched)
    assert names.seen == ["accumulate_gram"]
    assert called[0].any()
    for a, b in zip(called[:4], dispatched[:4], strict=True):
        assert torch.equal(a, b)


def test_eager_code_calls_the_function_itself():
    operator = torch.ops.dopr.accumulate_gram.default
    with patch.object(type(operator), "__call__", side_effect=AssertionError("operator")):
        accumulate_gram(*gram_arguments())


@pytest.mark.parametrize("operator", [accumulate_gram, accumulate_token_counts])
def test_fake_tensors_read_no_value(operator):
    with FakeTensorMode():
        if operator is accumulate_gram:
            operator(*gram_arguments())
        else:
            ids, skips = torch.zeros(5, dtype=torch.int64), torch.tensor(False)
            operator(torch.zeros(3), torch.zeros((), dtype=torch.int64), ids, skips)
