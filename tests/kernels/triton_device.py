"""Where the tests of the Triton kernels run: on a GPU, or in Triton's interpreter on the CPU.

The interpreter is chosen by TRITON_INTERPRET=1 when triton is imported, for the whole process:
`test_triton_interpreted.py` runs the files that import this one in processes of their own.
"""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: it is for Linux only")
INTERPRETED = triton.knobs.runtime.interpret
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("no GPU: test_triton_interpreted.py runs this file", allow_module_level=True)

from optim.kernels import _triton_apply as triton_apply  # noqa: E402, F401
from optim.kernels import _triton_gram as triton_gram  # noqa: E402, F401
from optim.kernels import _triton_newton_schulz as triton_newton_schulz  # noqa: E402, F401
from optim.kernels import _triton_symmetric as triton_symmetric  # noqa: E402, F401
from optim.kernels import _triton_tiles as triton_tiles  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
SMALL = triton_tiles.Config(tile=16, depth=16, num_warps=4, num_stages=2)  # many tiles


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
