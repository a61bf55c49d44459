"""Whether Triton's interpreter, which TRITON_INTERPRET=1 asks for, runs here at all."""

import pytest
from packaging.version import Version

triton = pytest.importorskip("triton", reason="triton is not installed: it is for Linux only")

needs_interpreter = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7"),
    reason="Triton 3.6 interprets loops by int() of an array, which NumPy warns of or refuses",
)
