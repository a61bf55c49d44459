"""The Triton kernels against what torch has for the same work, run alternately.

    python -m bench.kernels [gram inverse apply orthogonalize] [--rounds 50] [--out FILE] [--tiny]

Of each case: median milliseconds, the median over rounds of the ratio to the first contender (below
1 is faster), and the error relative to float64. Cases in which the error of what ships is above its
tolerance are named at the end, with exit code 1. Needs a GPU; --tiny runs the same logic on small
matrices anywhere, in Triton's interpreter (TRITON_INTERPRET=1) without a GPU.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.arguments import operations_parser, parse_operations
from bench.timing import DEVICE, compared, facts, interleaved, write_rows
from optim.dopr.layer import precondition
from optim.kernels import _triton_apply, _triton_gram, _triton_newton_schulz, gram, newton_schulz
from optim.kernels.cholesky import dense_inverse_root
from optim.kernels.deflation import DEFLATION_RANK, deflate, deflated_condition_bound, restore
from optim.kernels.newton_schulz import full_precision, newton_iterations

GAMMA = 0.1
BETA = 0.95
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SIZES: dict[str, list[Any]] = {
    "gram": list(itertools.product((768, 1024, 1600, 3072), (8192, 65536))),  # d, n
    "inverse": [(48, 768), (12, 3072)],  # matrices, d
    "apply": [  # layers, d_out, blocks, block: those of GPT-2 124M
        *((12, 2304, 1, 768), (12, 768, 1, 768), (12, 3072, 1, 768), (12, 768, 4, 768)),
        (12, 768, 1, 3072),
    ],
    "orthogonalize": [(36, 768, 768), (12, 3072, 768), (12, 768, 3072), (12, 1600, 1600)],
}
SHIPPED = {  # what ships, and the error that it may have
    "gram": ("triton", 2e-4),  # tensor cores cut off what they add to an fp32 sum of up to n terms
    "inverse": ("triton deflated", 1e-3),  # kernels.cholesky.WANTED_ERROR
    "apply": ("triton tf32x3", 1e-5),  # 21 bits
    "orthogonalize": ("triton", 0.1),  # bf16 resolves 2^-8, five iterations deep
}
TINY = {
    "gram": [(24, 64)],
    "inverse": [(2, 16)],
    "apply": [(2, 12, 1, 16), (2, 12, 2, 8)],
    "orthogonalize": [(2, 16, 24)],
}


class Case(NamedTuple):
    """One piece of work, its contenders, and what they should give, in float64."""

    name: str
    contenders: Mapping[str, Callable[[], Tensor]]
    exact: Callable[[], Tensor]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(0)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def activations(*shape: int) -> Tensor:  # (..., n, d)
    """Rows whose covariance has eigenvalues like 1 / i², in no special basis."""
    d = shape[-1]
    Q = torch.linalg.qr(randn(d, d))[0]
    return randn(*shape) / torch.arange(1, d + 1, device=DEVICE) @ Q


def gram_cases(d: int, n: int) -> Iterator[Case]:
    """S <- β S + (1 - β)/n zᵀ z; `mm` is only the product, half of whose elements are needed."""
    for name, dtype in DTYPES.items():
        z = randn(n, d, dtype=dtype)
        numbers = {"beta": BETA, "alpha": (1 - BETA) / n}
        contenders = {
            "unfused": partial(_updated, gram.gram_, z, torch.zeros(1, d, d, device=DEVICE)),
            "mm": partial(_product, z, numbers["alpha"]),
            "triton": partial(_updated, _triton_gram.gram_, z, torch.zeros(1, d, d, device=DEVICE)),
        }
        for key in ("unfused", "triton"):
            contenders[key] = partial(contenders[key], **numbers)
        yield Case(f"gram {name} d={d} n={n}", contenders, partial(_product64, z, **numbers))


def _updated(gram_: Callable[..., int], z: Tensor, S: Tensor, **numbers: float) -> Tensor:
    with full_precision(DEVICE.type):
        gram_(S, z, **numbers)
    return S


def _product(z: Tensor, alpha: float) -> Tensor:
    with full_precision(DEVICE.type):
        if z.is_cuda and z.dtype == torch.bfloat16:
            return torch.mm(z.mT, z, out_dtype=torch.float32).mul_(alpha)[None]
        return (z.float().mT @ z.float()).mul_(alpha)[None]


def _product64(z: Tensor, beta: float, alpha: float) -> Tensor:
    return alpha * (z.double().mT @ z.double())[None]


def inverse_cases(N: int, d: int) -> Iterator[Case]:
    """(Σ + γ̄ I)⁻¹ of N covariances; `cholesky` and `triton deflated` are what ships."""
    z = activations(N, 4 * d, d)
    sigma = gram.mirror_(z.mT @ z / (4 * d))
    damping = GAMMA * sigma.diagonal(dim1=-2, dim2=-1).mean(-1)  # (N,)
    A = sigma + damping[:, None, None] * torch.eye(d, device=DEVICE)
    condition_bound, U = d / GAMMA, torch.linalg.qr(randn(N, d, DEFLATION_RANK))[0]
    iterations = newton_iterations(condition_bound + d**0.5, 1)
    deflated_iterations = newton_iterations(deflated_condition_bound(condition_bound) + d**0.5, 1)
    numbers = {"lower_bound": damping, "iterations": iterations}
    triton = partial(_triton_newton_schulz.inverse_root, A, 1, **numbers)
    contenders = {
        "cholesky": lambda: dense_inverse_root(A, 1)[0],
        "cholesky fp32": lambda: torch.cholesky_inverse(torch.linalg.cholesky(A)),
        **({"eigh fp32": partial(_by_eigh, A)} if d <= 1024 else {}),  # minutes beyond
        "newton_schulz": partial(newton_schulz.inverse_root, A, 1, **numbers),
        "triton deflated": partial(_by_deflation, sigma, damping, U, deflated_iterations),
        "triton bf16x3": partial(triton, precision="bf16x3"),
        "triton tf32": partial(triton, precision="tf32"),
        "triton ieee": partial(triton, precision="ieee"),
    }
    name = f"inverse N={N} d={d} iterations={iterations} deflated={deflated_iterations}"
    yield Case(name, contenders, lambda: torch.linalg.inv(A.double()))


def _by_deflation(sigma: Tensor, damping: Tensor, U: Tensor, iterations: int) -> Tensor:
    """All of a deflated inverse: U moves on, A' is formed and inverted, A⁻¹ is brought back."""
    part = deflate(sigma, damping, U)
    numbers = {"lower_bound": damping, "iterations": iterations}
    return restore(_triton_newton_schulz.inverse_root(part.A, 1, **numbers), part)


def _by_eigh(A: Tensor) -> Tensor:
    w, Q = torch.linalg.eigh(A)
    with full_precision(DEVICE.type):
        return (Q / w[..., None, :]) @ Q.mT


def apply_cases(N: int, m: int, blocks: int, b: int) -> Iterator[Case]:
    """M = G P of N layers; `bmm` takes the layers, or the blocks of one layer, as a batch."""
    G, P = randn(N, m, blocks * b), gram.mirror_(randn(N, blocks, b, b))
    triton = partial(_triton_apply.apply, G, P)
    contenders = {
        "bmm": partial(_bmm, G, P),
        "layer by layer": lambda: torch.stack(list(map(precondition, G, P))),
        "triton tf32x3": partial(triton, precision="tf32x3"),
        "triton bf16x3": partial(triton, precision="bf16x3"),
        "triton ieee": partial(triton, precision="ieee"),
    }
    exact = partial(_bmm, G.double(), P.double())
    yield Case(f"apply N={N} m={m} blocks={blocks} b={b}", contenders, exact)


def _bmm(G: Tensor, P: Tensor) -> Tensor:
    (N, m, d), (_, blocks, b, _) = G.shape, P.shape
    with full_precision(DEVICE.type):
        slices = G.view(N, m, blocks, b).transpose(1, 2)  # (N, blocks, m, b)
        return (slices @ P).transpose(1, 2).reshape(N, m, d)


def orthogonalize_cases(N: int, m: int, n: int) -> Iterator[Case]:
    """Muon's five steps on N gradients; exact is the same polynomial in float64."""
    G = randn(N, m, n)
    for name, dtype in DTYPES.items():
        contenders = {
            "torch": partial(newton_schulz.orthogonalize, G, dtype=dtype),
            "triton": partial(_triton_newton_schulz.orthogonalize, G, dtype=dtype),
        }
        exact = partial(newton_schulz.orthogonalize, G.double(), dtype=torch.float64)
        yield Case(f"orthogonalize {name} {N}x{m}x{n}", contenders, exact)


CASES: dict[str, Callable[..., Iterator[Case]]] = {
    "gram": gram_cases,
    "inverse": inverse_cases,
    "apply": apply_cases,
    "orthogonalize": orthogonalize_cases,
}


def measure(case: Case, *, rounds: int, seconds: float) -> dict[str, Any]:
    """One row of the result."""
    exact = case.exact()
    errors = {}
    for name, work in case.contenders.items():  # the first call compiles
        errors[name] = ((work() - exact).norm() / exact.norm()).item()
    del exact
    times = interleaved(case.contenders, DEVICE, rounds=rounds, seconds=seconds)
    return {"case": case.name, "error": errors, **compared(times)}


def is_exact(operation: str, row: dict[str, Any]) -> bool:
    """Whether what ships of `operation` is within its tolerance; false where it is NaN."""
    shipped, tolerance = SHIPPED[operation]
    return row["error"][shipped] <= tolerance


def shown(row: dict[str, Any]) -> str:
    """Milliseconds, ratio and error of every contender, for people."""
    texts = (
        f"{name} {ms:.3f} ms ({row['ratio'][name]:.2f}, error {row['error'][name]:.0e})"
        for name, ms in row["ms"].items()
    )
    return "  ".join([row["case"], *texts])


def main() -> None:
    tiny = "small matrices, one round"
    parser = operations_parser("kernels", __doc__, CASES, rounds=50, tiny=tiny)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a case, about")
    arguments = parse_operations(parser, CASES, has_gpu=DEVICE.type == "cuda")
    environment, rows, inexact = facts(DEVICE), [], []
    for operation in arguments.operations:
        for sizes in (TINY if arguments.tiny else SIZES)[operation]:
            for case in CASES[operation](*sizes):
                rows.append(measure(case, rounds=arguments.rounds, seconds=arguments.seconds))
                inexact += [] if is_exact(operation, rows[-1]) else [case.name]
                print(shown(rows[-1]), flush=True)
                write_rows(arguments.out, environment, rows)
    if inexact:
        print(f"error: beyond the tolerance: {'; '.join(inexact)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
