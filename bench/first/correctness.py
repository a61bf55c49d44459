"""Compare every Triton kernel with float64, at GPT-2's shapes and at odd ones, in two minutes.

    python -m bench.first.correctness [gram symmetric apply orthogonalize inverse] [--out FILE]

The cases are in bench/first/cases.py. Every case runs twice on the same inputs, with NaN in each
buffer that a kernel allocates. Its error is the larger one of the relative errors in the Frobenius
norm and of the largest element. A case is right if its error is within its tolerance, the results
that must be symmetric are, and both runs give the same bits. A second call keeps the rows in FILE
that the same sources measured on such a machine. Needs a GPU; with --tiny and TRITON_INTERPRET=1,
it runs on small matrices anywhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.arguments import parse_operations
from bench.first.attempt import attempt, missing
from bench.first.cases import CASES, FULL, TINY, KernelCheck
from bench.results import earlier_rows
from bench.timing import DEVICE, facts, measure_all


@contextmanager
def poisoned_buffers() -> Iterator[None]:
    """Fill every buffer that `Tensor.new_empty` allocates with NaN."""
    allocate = torch.Tensor.new_empty

    def new_empty(self: Tensor, size: Any, **options: Any) -> Tensor:
        buffer = allocate(self, size, **options)
        return buffer if size == 0 else buffer.fill_(torch.nan)  # 0: Triton's interpreter

    with patch.object(torch.Tensor, "new_empty", new_empty):
        yield


def error(got: Tensor, exact: Tensor) -> float:
    """Return the larger one of the relative errors in the Frobenius and the maximum norm."""
    difference = got.double() - exact
    norms = (torch.linalg.vector_norm(difference), torch.linalg.vector_norm(exact))
    largest = (difference.abs().max(), exact.abs().max())
    return max((a / b).item() for a, b in (norms, largest))


def measure(check: KernelCheck) -> dict[str, Any]:
    """Return the row of a case. A kernel that raises is wrong, and `exception` says why."""
    row = {"case": check.name, "tolerance": check.tolerance, "is_right": False}
    return row | attempt(partial(compare, check))


def compare(check: KernelCheck) -> dict[str, Any]:
    """Run a kernel twice and compare its results with the exact ones and with each other."""
    with poisoned_buffers():
        first, second = check.compute(), check.compute()
    errors = [error(*pair) for pair in zip(first, check.exact(), strict=True)]
    largest = max(errors, key=lambda e: (e != e, e))  # NaN is the largest
    is_symmetric = not check.is_symmetric or torch.equal(first[0], first[0].mT)
    is_repeatable = all(map(torch.equal, first, second))
    row = {"error": largest, "is_symmetric": is_symmetric, "is_repeatable": is_repeatable}
    return row | {"is_right": largest <= check.tolerance and is_symmetric and is_repeatable}


def describe(row: dict[str, Any]) -> str:
    if "exception" in row:
        return f"WRONG  {row['case']}  {row['exception']}"
    flags = [name for name in ("is_symmetric", "is_repeatable") if not row[name]]
    text = f"{row['case']}  error {row['error']:.1e} of {row['tolerance']:.0e}"
    return "  ".join(["ok   " if row["is_right"] else "WRONG", text, *(f"not {f}" for f in flags)])


def main() -> None:
    arguments = parse_operations(
        *("first.correctness", __doc__, CASES),
        rounds=1,
        tiny="check small matrices",
        has_gpu=DEVICE.type == "cuda",
    )
    rows = earlier_rows(arguments.out, facts(DEVICE))
    checks = missing(CASES, TINY if arguments.tiny else FULL, arguments.operations, rows)
    rows = measure_all(checks, measure, describe, arguments.out, rows)
    wrong = [row["case"] for row in rows if not row["is_right"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} cases are right")


if __name__ == "__main__":
    main()
