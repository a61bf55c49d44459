"""Find the fastest tile configuration of each Triton kernel.

    python -m bench.tiles [gram apply symmetric] [--rounds 10] [--out FILE] [--tiny]

The candidates are tiles of 64 or 128, depths of 32 or 64, 4 or 8 warps and 2 to 4 stages. They take
turns with the default configuration at the shapes of GPT-2 124M. Each case reports the median
milliseconds, the median over rounds of the ratio to the default (below 1 is faster), the fastest
candidate, and the relative difference of each result from the default's. Needs a GPU. With --tiny,
the same code runs on small matrices; without a GPU, set TRITON_INTERPRET=1.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from bench.arguments import parse_operations
from bench.kernels import activations, randn
from bench.timing import DEVICE, compared, interleaved, measure_all
from optim.kernels import _triton_apply, _triton_gram, _triton_symmetric
from optim.kernels._triton_tiles import Precision, TileConfig

CANDIDATES = [
    TileConfig(*each) for each in itertools.product((64, 128), (32, 64), (4, 8), (2, 3, 4))
]
TINY_CANDIDATES = [TileConfig(16, 16, 4, 2), TileConfig(32, 16, 4, 2)]
SIZES: dict[str, list[Any]] = {
    "gram": [  # dtype, tokens, covariance blocks, block width: of exact mode, then of sampled mode
        *((torch.bfloat16, 32768, 1, 768), (torch.bfloat16, 32768, 1, 3072)),
        *((torch.bfloat16, 4096, 1, 768), (torch.bfloat16, 4096, 4, 768)),
    ],
    "apply": [(12, 2304, 1, 768), (12, 768, 4, 768)],  # layers, d_out, covariance blocks, width
    "symmetric": [  # dtype, precision, matrices, d, k, adds C: of Muon, then of inverses
        (torch.bfloat16, "bf16", 36, 768, 768, True),
        (torch.bfloat16, "bf16", 12, 768, 3072, False),
        (torch.float32, "bf16x3", 48, 768, 768, True),
    ],
}
TINY: dict[str, list[Any]] = {
    "gram": [(torch.float32, 48, 2, 24)],
    "apply": [(2, 20, 1, 24)],
    "symmetric": [(torch.float32, "ieee", 2, 24, 20, False)],
}


class TileCase(NamedTuple):
    """A kernel at one size: its default configuration, and its work with any configuration."""

    name: str
    shipped: TileConfig
    work: Callable[[TileConfig], Tensor]


def gram_case(dtype: torch.dtype, n: int, n_blocks: int, b: int) -> TileCase:
    z, S = activations(n, n_blocks * b).to(dtype), torch.zeros(n_blocks, b, b, device=DEVICE)

    def work(config: TileConfig) -> Tensor:
        _triton_gram.gram_(S, z, beta=0.0, alpha=1 / n, config=config)
        return S

    shipped = _triton_gram.CONFIGS[_triton_gram.PRECISIONS[dtype]]
    return TileCase(f"gram {dtype} n={n} blocks={n_blocks} b={b}", shipped, work)


def apply_case(N: int, m: int, n_blocks: int, b: int) -> TileCase:
    G, P = randn(N, m, n_blocks * b), randn(N, n_blocks, b, b)
    name = f"apply tf32x3 N={N} m={m} blocks={n_blocks} b={b}"
    return TileCase(
        *(name, _triton_apply.CONFIGS["tf32x3"]),
        lambda config: _triton_apply.apply(G, P, precision="tf32x3", config=config),
    )


def symmetric_case(
    dtype: torch.dtype, precision: Precision, N: int, d: int, k: int, has_C: bool
) -> TileCase:
    A = randn(N, d, k, dtype=dtype)
    options: dict[str, Any] = {"precision": precision, "C": A.clone() if has_C else None}

    def work(config: TileConfig) -> Tensor:
        return _triton_symmetric.symmetric_product(A, A, config=config, **options)

    shipped = _triton_symmetric.CONFIGS[dtype, precision]
    return TileCase(f"symmetric {precision} N={N} d={d} k={k} C={has_C}", shipped, work)


CASES: dict[str, Callable[..., TileCase]] = {
    "gram": gram_case,
    "apply": apply_case,
    "symmetric": symmetric_case,
}
# The largest relative difference that another order of summation explains.
MAX_DIFFERENCE = 1e-3


def cases(arguments: argparse.Namespace) -> Iterator[TileCase]:
    sizes = TINY if arguments.tiny else SIZES
    for operation in arguments.operations:
        yield from (CASES[operation](*size) for size in sizes[operation])


def measure(case: TileCase, candidates: list[TileConfig], *, rounds: int) -> dict[str, Any]:
    """Return the row of one case. The fastest configuration is chosen among accurate ones."""
    default = label(case.shipped)
    expected = case.work(case.shipped).clone()
    contenders = {default: lambda: case.work(case.shipped)}
    too_large, differences = [], {default: 0.0}
    for config in candidates:
        try:
            result = case.work(config)
        except (OutOfResources, PTXASError):
            too_large.append(label(config))
            continue
        differences[label(config)] = ((result - expected).norm() / expected.norm()).item()
        contenders.setdefault(label(config), lambda config=config: case.work(config))
    summary = compared(interleaved(contenders, DEVICE, rounds=rounds, seconds=20))
    accurate = [name for name, difference in differences.items() if difference < MAX_DIFFERENCE]
    best = min(accurate, key=summary["ratio"].__getitem__)
    row = {"case": case.name, "shipped": default, "best": best, **summary}
    return row | {"difference": differences, "does_not_fit": too_large}


def label(config: TileConfig) -> str:
    tile, depth, num_warps, num_stages = config
    return f"{tile}x{depth} {num_warps} warps {num_stages} stages"


def describe(row: dict[str, Any]) -> str:
    best = row["best"]
    return f"{row['case']}  best {best}: {row['ms'][best]:.3f} ms ({row['ratio'][best]:.2f})"


def main() -> None:
    arguments = parse_operations(
        *("tiles", __doc__, CASES),
        rounds=10,
        tiny="measure small matrices and two configurations",
        has_gpu=DEVICE.type == "cuda",
    )
    candidates = TINY_CANDIDATES if arguments.tiny else CANDIDATES
    measure_case = partial(measure, candidates=candidates, rounds=arguments.rounds)
    measure_all(cases(arguments), measure_case, describe, arguments.out)


if __name__ == "__main__":
    main()
