"""Time the Triton kernels against torch at the widths of GPT-2 124M, in a minute.

    python -m bench.first.kernels [gram inverse apply] [--rounds 10] [--out FILE] [--tiny]

These are the cases of bench.kernels with d = 768 or 3072. A second call keeps the rows in FILE that
the same sources measured on such a machine, and measures the other cases. Needs a GPU; with
--tiny and TRITON_INTERPRET=1, it runs on small matrices anywhere.
"""

import itertools
from functools import partial
from typing import Any

from bench import kernels
from bench.arguments import parse_operations
from bench.first.attempt import attempt, missing
from bench.kernels import KernelCase
from bench.results import earlier_rows
from bench.timing import DEVICE, facts, measure_all

SIZES: dict[str, list[Any]] = {
    "gram": list(itertools.product((768, 3072), (8192, 65536))),  # d, tokens
    "inverse": kernels.SIZES["inverse"],
    "apply": kernels.SIZES["apply"],
}
SECONDS = 2.0  # From the fourth round on, no round of a case starts after this time.


def measure(case: KernelCase, *, rounds: int) -> dict[str, Any]:
    """Return the row of one case. If a contender raises, `exception` says why."""
    work = partial(kernels.measure, case, rounds=rounds, seconds=SECONDS)
    return {"case": case.name} | attempt(work)


def describe(row: dict[str, Any]) -> str:
    failed = f"{row['case']}  FAILED  {row.get('exception')}"
    return failed if "exception" in row else kernels.describe(row)


def main() -> None:
    arguments = parse_operations(
        *("first.kernels", __doc__, SIZES),
        rounds=10,
        tiny="measure small matrices, in one round",
        has_gpu=DEVICE.type == "cuda",
    )
    rows = earlier_rows(arguments.out, facts(DEVICE))
    sizes = kernels.TINY if arguments.tiny else SIZES
    cases = missing(kernels.CASES, sizes, arguments.operations, rows)
    measure_case = partial(measure, rounds=arguments.rounds)
    measure_all(cases, measure_case, describe, arguments.out, rows)


if __name__ == "__main__":
    main()
