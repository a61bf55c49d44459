"""kernels/dispatch.py: the selected backend, log messages and errors on every kind of host."""

import logging

import pytest
import torch

from optim.kernels import dispatch
from optim.kernels.dispatch import check_backend, choose_backend, describe_backend, triton_problem

X = torch.ones(8, 16)


class Cuda:
    """A stand-in for a tensor on a GPU, with the attributes that `choose_backend` reads."""

    def __init__(self, dtype=torch.bfloat16):
        self.device, self.dtype = torch.device("cuda", 0), dtype


@pytest.fixture(autouse=True)
def fresh():
    dispatch._log_choice.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Simulate a host with triton and a GPU; return a function that changes its properties."""

    def set_host(capability=(9, 0), interpreted=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(dispatch, "_is_interpreted", lambda: interpreted)

    set_host()
    return set_host


@pytest.fixture
def no_gpu(monkeypatch):
    """Simulate a host with triton but without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch, "_is_interpreted", lambda: False)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_explicit_backend_is_used(backend):
    assert choose_backend(backend, "gram", X, row_bytes=[3]) == backend


def test_auto_on_a_cpu_is_torch_and_says_so_once(caplog):
    with caplog.at_level(logging.INFO, logger="dopr"):
        choices = [choose_backend("auto", "gram", X, row_bytes=[64]) for _ in range(3)]
    assert choices == ["torch"] * 3
    assert len(caplog.records) == 1
    assert "gram: backend='auto' uses torch" in caplog.text


def test_each_operation_says_what_it_takes(caplog, gpu):
    with caplog.at_level(logging.INFO, logger="dopr"):
        for operation in ("gram", "G P", "gram"):
            choose_backend("auto", operation, Cuda(), row_bytes=[64])
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"{name}: backend='auto' uses triton" for name in ("gram", "G P")]


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


def test_triton_without_a_gpu_is_refused(no_gpu):
    with pytest.raises(ValueError, match=r"^backend='triton' needs CUDA or TRITON_INTERPRET=1"):
        check_backend("triton", [X])


@pytest.mark.parametrize(
    ("host", "tensor", "message"),
    [
        ({}, X, "needs tensors on a CUDA GPU; these are on cpu"),
        ({}, Cuda(torch.float64), "does not support torch.float64"),
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


def test_the_description_says_which_backend_auto_selects(gpu):
    assert describe_backend("torch", X.device) == "backend: torch"
    assert describe_backend("auto", X.device).startswith("backend: torch (auto")
    assert describe_backend("auto", Cuda().device).startswith("backend: triton (auto")
    assert triton_problem(Cuda().device) == ""
