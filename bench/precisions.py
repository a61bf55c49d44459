"""Run train.py with one precision of DoPr changed, to measure the effect of this precision.

    python -m bench.precisions CHANGE config/gpt2_dopr.py [--key=value ...]

CHANGE is one of:
    shipped         change nothing
    bf16_gradients  compute weight gradients as bf16 products, as training without DoPr does;
                    the default is fp32
    bf16x3_apply    compute M = G P in Triton with three bf16 products per fp32 product;
                    the default is three tf32 products
    ieee_apply      compute M = G P in Triton in fp32
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
from optim.dopr import autograd


def bf16_gradients() -> AbstractContextManager:
    return patch.object(autograd, "_matmul_fp32", torch.matmul)


def apply_in(precision: Literal["bf16x3", "ieee"]) -> AbstractContextManager:
    from optim.kernels import _triton_apply  # imports triton

    return patch.object(_triton_apply, "apply", partial(_triton_apply.apply, precision=precision))


CHANGES: dict[str, Callable[[], AbstractContextManager]] = {
    "shipped": nullcontext,
    "bf16_gradients": bf16_gradients,
    "bf16x3_apply": partial(apply_in, "bf16x3"),
    "ieee_apply": partial(apply_in, "ieee"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code of train.py."""
    parser = command_parser("bench.precisions", __doc__)
    parser.add_argument("change", choices=CHANGES)
    arguments, train_argv = parser.parse_known_args(argv)
    with CHANGES[arguments.change]():
        return train.main(train_argv)


if __name__ == "__main__":
    sys.exit(main())
