"""The device for tests of the Triton kernels: a GPU, or the CPU with Triton's interpreter.

TRITON_INTERPRET=1 selects the interpreter for the whole process when triton is imported. Therefore
`test_triton_interpreted.py` runs each file that imports this module in a separate process.
"""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed; it supports Linux only")
INTERPRETED = triton.knobs.runtime.interpret
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("no GPU: test_triton_interpreted.py runs this file", allow_module_level=True)

from optim.kernels import _triton_apply as triton_apply  # noqa: E402, F401
from optim.kernels import _triton_gram as triton_gram  # noqa: E402, F401
from optim.kernels import _triton_newton_schulz as triton_newton_schulz  # noqa: E402, F401
from optim.kernels import _triton_symmetric as triton_symmetric  # noqa: E402, F401
from optim.kernels import _triton_tiles as triton_tiles  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
SMALL = triton_tiles.TileConfig(tile=16, depth=16, num_warps=4, num_stages=2)  # gives many tiles


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
