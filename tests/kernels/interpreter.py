"""A mark that skips a test if Triton's interpreter (TRITON_INTERPRET=1) does not work here."""

import pytest
from packaging.version import Version

triton = pytest.importorskip("triton", reason="triton is not installed; it supports Linux only")

needs_interpreter = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7"),
    reason="Triton 3.6 interprets loops by int(array), for which NumPy warns or raises",
)
