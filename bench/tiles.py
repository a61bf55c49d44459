"""Which tiles make a Triton kernel fastest? Every configuration that fits, against what ships.

    python -m bench.tiles [gram apply symmetric] [--rounds 10] [--out FILE] [--tiny]

Tiles of 64 or 128, 32 or 64 terms at a time, 4 or 8 warps and 2 to 4 stages, in turns, at GPT-2
124M's shapes. Of each case: median milliseconds, the median over rounds of the ratio to what ships
(below 1 is faster), the best, and how far its result is from that of what ships. Needs a GPU;
--tiny runs the same logic on small matrices, in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from bench.arguments import operations_parser, parse_operations
from bench.kernels import activations, randn
from bench.timing import DEVICE, compared, facts, interleaved, write_rows
from optim.kernels import _triton_apply, _triton_gram, _triton_symmetric
from optim.kernels._triton_tiles import Config, Precision

CANDIDATES = [Config(*each) for each in itertools.product((64, 128), (32, 64), (4, 8), (2, 3, 4))]
TINY_CANDIDATES = [Config(16, 16, 4, 2), Config(32, 16, 4, 2)]
SIZES: dict[str, list[Any]] = {
    "gram": [  # tokens of a micro-batch, blocks, block: exact mode's, and fast mode's sample
        *((torch.bfloat16, 32768, 1, 768), (torch.bfloat16, 32768, 1, 3072)),
        *((torch.bfloat16, 4096, 1, 768), (torch.bfloat16, 4096, 4, 768)),
    ],
    "apply": [(12, 2304, 1, 768), (12, 768, 4, 768)],  # layers, d_out, blocks, block
    "symmetric": [  # matrices, d, k, whether C is added: Muon's, and those of inverses
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


class Case(NamedTuple):
    """A kernel at one size: what ships, and the work with a configuration."""

    name: str
    shipped: Config
    work: Callable[[Config], Tensor]


def gram_case(dtype: torch.dtype, n: int, blocks: int, b: int) -> Case:
    z, S = activations(n, blocks * b).to(dtype), torch.zeros(blocks, b, b, device=DEVICE)

    def work(config: Config) -> Tensor:
        _triton_gram.gram_(S, z, beta=0.0, alpha=1 / n, config=config)
        return S

    shipped = _triton_gram.CONFIGS[_triton_gram.PRECISIONS[dtype]]
    return Case(f"gram {dtype} n={n} blocks={blocks} b={b}", shipped, work)


def apply_case(N: int, m: int, blocks: int, b: int) -> Case:
    G, P = randn(N, m, blocks * b), randn(N, blocks, b, b)
    name = f"apply tf32x3 N={N} m={m} blocks={blocks} b={b}"
    return Case(
        *(name, _triton_apply.CONFIGS["tf32x3"]),
        lambda config: _triton_apply.apply(G, P, precision="tf32x3", config=config),
    )


def symmetric_case(
    dtype: torch.dtype, precision: Precision, N: int, d: int, k: int, has_C: bool
) -> Case:
    A = randn(N, d, k, dtype=dtype)
    how: dict[str, Any] = {"precision": precision, "C": A.clone() if has_C else None}

    def work(config: Config) -> Tensor:
        return _triton_symmetric.symmetric_product(A, A, config=config, **how)

    shipped = _triton_symmetric.CONFIGS[dtype, precision]
    return Case(f"symmetric {precision} N={N} d={d} k={k} C={has_C}", shipped, work)


AGREES = 1e-3  # relative difference of two orders of summation, at most; NaN does not
CASES: dict[str, Callable[..., Case]] = {
    "gram": gram_case,
    "apply": apply_case,
    "symmetric": symmetric_case,
}


def measure(case: Case, candidates: list[Config], *, rounds: int) -> dict[str, Any]:
    """One row of the result."""
    wanted = case.work(case.shipped).clone()
    contenders = {label(case.shipped): lambda: case.work(case.shipped)}
    left_out, differences = [], {label(case.shipped): 0.0}
    for config in candidates:
        try:
            found = case.work(config)
        except (OutOfResources, PTXASError):
            left_out.append(label(config))
            continue
        differences[label(config)] = ((found - wanted).norm() / wanted.norm()).item()
        contenders.setdefault(label(config), lambda config=config: case.work(config))
    result = compared(interleaved(contenders, DEVICE, rounds=rounds, seconds=20))
    agreeing = [name for name, difference in differences.items() if difference < AGREES]
    best = min(agreeing, key=result["ratio"].__getitem__)
    row = {"case": case.name, "shipped": label(case.shipped), "best": best, **result}
    return row | {"difference": differences, "does_not_fit": left_out}


def label(config: Config) -> str:
    tile, depth, num_warps, num_stages = config
    return f"{tile}x{depth} {num_warps} warps {num_stages} stages"


def cases(operations: list[str], sizes: dict[str, list[Any]]) -> Iterator[Case]:
    for operation in operations:
        yield from (CASES[operation](*size) for size in sizes[operation])


def main() -> None:
    tiny = "small matrices, two configurations"
    parser = operations_parser("tiles", __doc__, CASES, rounds=10, tiny=tiny)
    arguments = parse_operations(parser, CASES, has_gpu=DEVICE.type == "cuda")
    sizes, candidates = (TINY, TINY_CANDIDATES) if arguments.tiny else (SIZES, CANDIDATES)
    environment, rows = facts(DEVICE), []
    for case in cases(arguments.operations, sizes):
        rows.append(measure(case, candidates, rounds=arguments.rounds))
        ms, ratio = (rows[-1][key][rows[-1]["best"]] for key in ("ms", "ratio"))
        print(f"{case.name}  best {rows[-1]['best']}: {ms:.3f} ms ({ratio:.2f})", flush=True)
        write_rows(arguments.out, environment, rows)


if __name__ == "__main__":
    main()
