"""kernels/dispatch.py on hosts of every kind: what runs, what is said, what is refused."""

import logging

import pytest
import torch

from optim.kernels import dispatch as choice
from optim.kernels.dispatch import check_backend, choose_backend, describe_backend, triton_problem

X = torch.ones(8, 16)


class Cuda:
    """What `choose` asks of a tensor, for one on a GPU that is not here."""

    def __init__(self, dtype=torch.bfloat16):
        self.device, self.dtype = torch.device("cuda", 0), dtype


@pytest.fixture(autouse=True)
def fresh():
    choice._log_choice.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A host with triton and a GPU; returns what sets its compute capability."""

    def of(capability=(9, 0), interpreted=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(choice, "_is_interpreted", lambda: interpreted)

    of()
    return of


@pytest.fixture
def plain(monkeypatch):
    """A host with triton and without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(choice, "_is_interpreted", lambda: False)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_who_is_named_is_taken(backend):
    assert choose_backend(backend, "gram", X, row_bytes=[3]) == backend


def test_auto_on_a_cpu_is_torch_and_says_so_once(caplog):
    with caplog.at_level(logging.INFO, logger="dopr"):
        choices = [choose_backend("auto", "gram", X, row_bytes=[64]) for _ in range(3)]
    assert choices == ["torch"] * 3
    said = "gram: backend='auto' takes torch (the tensors are on cpu)"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_each_operation_says_what_it_takes(caplog, gpu):
    with caplog.at_level(logging.INFO, logger="dopr"):
        for operation in ("gram", "G P", "gram"):
            choose_backend("auto", operation, Cuda(), row_bytes=[64])
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{operation}: backend='auto' takes triton" for operation in ("gram", "G P")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_on_a_gpu_is_triton_for_rows_of_16_bytes(dtype, gpu):
    per_copy = 16 // dtype.itemsize  # 8 of bf16, 4 of fp32
    for size in range(1, 40):
        got = choose_backend("auto", "gram", Cuda(dtype), row_bytes=[64, size * dtype.itemsize])
        assert got == ("torch" if size % per_copy else "triton")


def test_auto_takes_torch_for_what_triton_cannot_do(gpu):
    assert choose_backend("auto", "gram", Cuda(), Cuda(torch.float64), row_bytes=[64]) == "torch"
    assert choose_backend("auto", "gram", Cuda(), X, row_bytes=[64]) == "torch"
    gpu(capability=(7, 5))
    assert choose_backend("auto", "gram", Cuda(), row_bytes=[64]) == "torch"
    gpu(interpreted=None)
    assert choose_backend("auto", "gram", Cuda(), row_bytes=[64]) == "torch"


def test_triton_on_a_plain_host_is_refused_by_a_message_that_helps(plain):
    wanted = (
        "backend='triton' needs CUDA or TRITON_INTERPRET=1; this host has neither. "
        "Use backend='torch'."
    )
    with pytest.raises(ValueError, match=r"^backend='triton' needs CUDA or") as error:
        check_backend("triton", [X])
    assert str(error.value) == wanted


@pytest.mark.parametrize(
    ("host", "tensor", "message"),
    [
        ({}, X, "needs tensors on a CUDA GPU; these are on cpu"),
        ({}, Cuda(torch.float64), "takes no torch.float64"),
        ({"capability": (7, 5)}, Cuda(), r"compute capability 8.0 or more; cuda:0 has 7.5"),
        ({"interpreted": None}, Cuda(), "the package triton, which cannot be imported"),
    ],
)
def test_triton_is_refused_where_it_cannot_run(host, tensor, message, gpu):
    gpu(**host)
    with pytest.raises(ValueError, match=message):
        check_backend("triton", [Cuda(), tensor])


def test_triton_is_accepted_where_it_can_run(gpu):
    check_backend("triton", [Cuda(), Cuda(torch.float32)])
    gpu(interpreted=True)
    check_backend("triton", [X])


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="backend='cuda': must be one of auto, torch, triton"):
        check_backend("cuda", [])
    with pytest.raises(ValueError, match="backend='Triton': must be one of auto, torch, triton"):
        choose_backend("Triton", "gram", X, row_bytes=[64])


def test_people_are_told_what_auto_means(gpu):
    assert describe_backend("torch", X.device) == "kernels: torch"
    assert describe_backend("auto", X.device) == "kernels: torch (auto: the tensors are on cpu)"
    assert describe_backend("auto", Cuda().device).startswith("kernels: triton (auto")
    assert triton_problem(Cuda().device) == ""
