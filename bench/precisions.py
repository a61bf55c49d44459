"""train.py with one precision of DoPr changed, to measure what it is worth.

    python -m bench.precisions CHANGE config/gpt2_dopr.py [--key=value ...]

shipped            nothing is changed
bf16_gradients     weight gradients leave their product in bf16, as without DoPr; shipped: fp32
bf16x3_apply       M = G P by Triton, three bf16 products for one of fp32; shipped: three of tf32
ieee_apply         M = G P by Triton in fp32
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal
from unittest.mock import patch

import torch

import train
from eval.command import command_parser
from optim.dopr import capture


def bf16_gradients() -> AbstractContextManager:
    return patch.object(capture, "_matmul_fp32", torch.matmul)


def apply_in(precision: Literal["bf16x3", "ieee"]) -> AbstractContextManager:
    from optim.kernels import _triton_apply  # wants triton

    return patch.object(_triton_apply, "apply", partial(_triton_apply.apply, precision=precision))


CHANGES: dict[str, Callable[[], AbstractContextManager]] = {
    "shipped": nullcontext,
    "bf16_gradients": bf16_gradients,
    "bf16x3_apply": partial(apply_in, "bf16x3"),
    "ieee_apply": partial(apply_in, "ieee"),
}


def main(argv: list[str] | None = None) -> int:
    """train.py's exit code."""
    parser = command_parser("bench.precisions", __doc__)
    parser.add_argument("change", choices=CHANGES)
    arguments, of_train = parser.parse_known_args(argv)
    with CHANGES[arguments.change]():
        return train.main(of_train)


if __name__ == "__main__":
    sys.exit(main())
