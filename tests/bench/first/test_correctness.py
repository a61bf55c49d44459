"""Tests of the comparison of the Triton kernels with float64."""

import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it is for Linux only")

from bench.first.cases import CASES, FULL, TINY, KernelCheck
from bench.first.correctness import describe, error, measure
from bench.process import ROOT

EXACT = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
LIGHT = ("bench.first.correctness", "bench.first.kernels", "bench.gpu", "bench.head", "bench.tiles")
# Imports fail that would leave torch, triton, numpy and the standard library, unless torch did it.
BLOCKED = f"""
import importlib, runpy, sys
import numpy, torch, torch._dynamo, triton.knobs
from importlib.machinery import PathFinder
loaded = {{name.partition(".")[0] for name in sys.modules}} - {{"tqdm"}}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        found = None if path or name in loaded else PathFinder.find_spec(name)
        if found and "site-packages" in str(found.origin):
            raise ModuleNotFoundError(name)
for name in [name for name in sys.modules if name.partition(".")[0] == "tqdm"]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocker())
try:
    import pydantic
except ModuleNotFoundError:
    for name in {LIGHT}:
        importlib.import_module(name)
    sys.argv[1:] = ["--tiny", "--rounds=1", "--seconds=1"]
    runpy.run_module("bench.first.steps", run_name="__main__")
"""


def check(*results, tolerance=1e-3, is_symmetric=True):
    """Return a check whose kernel gives one of the results after the other."""
    given = iter(results)
    return KernelCheck("case", tolerance, lambda: [next(given)], lambda: [EXACT], is_symmetric)


def test_an_error_is_that_of_the_norm_or_of_the_largest_element():
    got = EXACT + torch.tensor([[0.0, 0.0], [0.0, 0.3]])
    assert error(got, EXACT) == pytest.approx(0.3 / 3)
    got = EXACT + 0.3
    assert error(got, EXACT) == pytest.approx(0.6 / EXACT.norm().item())


@pytest.mark.parametrize(
    ("first", "second", "wrong"),
    [
        (EXACT, EXACT, ""),
        (1.01 * EXACT, 1.01 * EXACT, "error"),
        (EXACT + torch.tensor([[0, math.nan], [0, 0]]), EXACT, "error"),
        (EXACT + torch.tensor([[0, 1e-6], [0, 0]]), EXACT, "is_symmetric"),
        (EXACT, 1.000001 * EXACT, "is_repeatable"),
    ],
)
def test_a_kernel_is_right_if_it_is_accurate_symmetric_and_repeatable(first, second, wrong):
    row = measure(check(first, second))
    assert row["is_right"] == (not wrong)
    assert describe(row).startswith("WRONG" if wrong else "ok")
    assert wrong != "error" or not row["error"] <= 1e-3
    assert wrong not in ("is_symmetric", "is_repeatable") or not row[wrong]


def test_a_kernel_that_raises_is_wrong_and_the_next_is_checked(capsys):
    row = measure(check())  # next() raises
    assert not row["is_right"]
    assert row["exception"].startswith("StopIteration")
    assert describe(row).startswith("WRONG  case  StopIteration")


def test_buffers_that_a_kernel_does_not_fill_are_nan():
    row = measure(KernelCheck("", 1.0, lambda: [EXACT.new_empty((2, 2))], lambda: [EXACT]))
    assert math.isnan(row["error"])
    assert not row["is_right"]


def test_every_operation_is_checked_at_the_widths_of_gpt2_and_at_odd_ones():
    assert FULL.keys() == TINY.keys() == CASES.keys()
    for sizes in FULL.values():
        numbers = [number for size in sizes for number in size]
        assert {768, 3072} <= set(numbers)
        assert any(number > 16 and number % 16 for number in numbers)


def test_steps_and_kernels_need_torch_triton_and_numpy_alone():
    command = [sys.executable, "-c", BLOCKED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "adamw exact" in done.stdout
