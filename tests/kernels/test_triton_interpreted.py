"""Run the tests of the Triton kernels in Triton's interpreter, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.interpreter import needs_interpreter

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
FILES = sorted(
    path
    for path in FOLDER.glob("test_*.py")
    if "\nfrom tests.kernels.triton_device " in path.read_text()
)


@needs_interpreter
def test_the_kernels_are_right_in_the_interpreter():
    assert len(FILES) > 4
    passes_in_the_interpreter(*FILES, "-m", "not slow")


@needs_interpreter
@pytest.mark.slow
def test_the_slow_cases_are_right_in_the_interpreter():
    passes_in_the_interpreter(*FILES, "-m", "slow")


def passes_in_the_interpreter(*arguments):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)  # set for the outer run, which may use workers
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
