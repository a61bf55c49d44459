"""Compare the Triton kernels with torch on the same work: time and accuracy.

    python -m bench.kernels [gram inverse apply orthogonalize] [--rounds 50] [--out FILE] [--tiny]

The contenders take turns. Each case reports the median milliseconds, the median over rounds of the
ratio to the first contender (below 1 is faster), and the error relative to float64. If the default
implementation misses its tolerance in some case, the command names that case at the end and exits
with code 1. Needs a GPU. With --tiny, the same code runs on small matrices on any machine; without
a GPU, set TRITON_INTERPRET=1 to use Triton's interpreter.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.arguments import parse_operations
from bench.kernel_rules import is_accurate
from bench.timing import DEVICE, compared, interleaved, measure_all
from optim.dopr.statistics import apply_P
from optim.kernels import _triton_apply, _triton_gram, _triton_newton_schulz, gram, newton_schulz
from optim.kernels._triton_tiles import Precision
from optim.kernels.deflation import DEFLATION_RANK, deflate, deflated_condition_bound, restore
from optim.kernels.dense_root import inverse_root_by_factorization
from optim.kernels.newton_schulz import newton_iterations
from optim.kernels.precision import full_precision
from optim.kernels.symmetric import mirror_

GAMMA = 0.1
BETA = 0.95
SECONDS = 5.0  # default of `measure`
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SIZES: dict[str, list[Any]] = {
    "gram": list(itertools.product((768, 1024, 1600, 3072), (8192, 65536))),  # d, tokens
    "inverse": [(48, 768), (12, 3072)],  # matrices, d
    "apply": [  # layers, d_out, covariance blocks, block width: the shapes of GPT-2 124M
        *((12, 2304, 1, 768), (12, 768, 1, 768), (12, 3072, 1, 768), (12, 768, 4, 768)),
        (12, 768, 1, 3072),
    ],
    # matrices, d_out, d_in
    "orthogonalize": [(36, 768, 768), (12, 3072, 768), (12, 768, 3072), (12, 1600, 1600)],
}
TINY = {
    "gram": [(24, 64)],
    "inverse": [(2, 16)],
    "apply": [(2, 12, 1, 16), (2, 12, 2, 8)],
    "orthogonalize": [(2, 16, 24)],
}


class KernelCase(NamedTuple):
    """One operation at one size: the contenders, and the exact result in float64."""

    name: str
    contenders: Mapping[str, Callable[[], Tensor | list[Tensor]]]
    exact: Callable[[], Tensor]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(0)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def activations(*shape: int) -> Tensor:  # (..., n, d)
    """Draw rows whose covariance has eigenvalues proportional to 1 / i², in a random basis."""
    d = shape[-1]
    Q = torch.linalg.qr(randn(d, d))[0]
    return randn(*shape) / torch.arange(1, d + 1, device=DEVICE) @ Q


def gram_cases(d: int, n: int) -> Iterator[KernelCase]:
    """Compare implementations of S <- β S + (1 - β)/n zᵀ z.

    The contender `mm` computes the product only, and both triangles of it.
    """
    for name, dtype in DTYPES.items():
        z = randn(n, d, dtype=dtype)
        factors = {"beta": BETA, "alpha": (1 - BETA) / n}
        contenders = {
            "unfused": partial(_updated, gram.gram_, z, torch.zeros(1, d, d, device=DEVICE)),
            "mm": partial(_product, z, factors["alpha"]),
            "triton": partial(_updated, _triton_gram.gram_, z, torch.zeros(1, d, d, device=DEVICE)),
        }
        for key in ("unfused", "triton"):
            contenders[key] = partial(contenders[key], **factors)
        yield KernelCase(f"gram {name} d={d} n={n}", contenders, partial(_product64, z, **factors))


def _updated(gram_: Callable[..., int], z: Tensor, S: Tensor, **factors: float) -> Tensor:
    with full_precision(DEVICE.type):
        gram_(S, z, **factors)
    return S


def _product(z: Tensor, alpha: float) -> Tensor:
    with full_precision(DEVICE.type):
        if z.is_cuda and z.dtype == torch.bfloat16:
            return torch.mm(z.mT, z, out_dtype=torch.float32).mul_(alpha)[None]
        return (z.float().mT @ z.float()).mul_(alpha)[None]


def _product64(z: Tensor, beta: float, alpha: float) -> Tensor:
    return alpha * (z.double().mT @ z.double())[None]


def inverse_cases(N: int, d: int) -> Iterator[KernelCase]:
    """Compare inversions of Σ + γ̄ I of N covariances.

    `cholesky` and `triton deflated` are the implementations that DoPr uses.
    """
    z = activations(N, 4 * d, d)
    sigma = mirror_(z.mT @ z / (4 * d))
    damping = GAMMA * sigma.diagonal(dim1=-2, dim2=-1).mean(-1)  # (N,)
    A = sigma + damping[:, None, None] * torch.eye(d, device=DEVICE)
    condition_bound, U = d / GAMMA, torch.linalg.qr(randn(N, d, DEFLATION_RANK))[0]
    iterations = newton_iterations(condition_bound + d**0.5, 1)
    deflated_iterations = newton_iterations(deflated_condition_bound(condition_bound) + d**0.5, 1)
    options = {"lower_bound": damping, "iterations": iterations}
    triton = partial(_triton_newton_schulz.inverse_root, A, 1, **options)
    contenders = {
        "cholesky": lambda: inverse_root_by_factorization(sigma, damping, 1)[0],
        "cholesky fp32": lambda: torch.cholesky_inverse(torch.linalg.cholesky(A)),
        **({"eigh fp32": partial(_by_eigh, A)} if d <= 1024 else {}),  # takes minutes if wider
        "newton_schulz": partial(newton_schulz.inverse_root, A, 1, **options),
        "triton deflated": partial(by_deflation, sigma, damping, U, deflated_iterations),
        "triton bf16x3": partial(triton, precision="bf16x3"),
        "triton tf32": partial(triton, precision="tf32"),
        "triton ieee": partial(triton, precision="ieee"),
    }
    name = f"inverse N={N} d={d} iterations={iterations} deflated={deflated_iterations}"
    yield KernelCase(name, contenders, lambda: torch.linalg.inv(A.double()))


def by_deflation(sigma: Tensor, damping: Tensor, U: Tensor, iterations: int) -> Tensor:
    """Invert with deflation: update U, form and invert the deflated A', restore A⁻¹ from it."""
    deflated = deflate(sigma, damping, U)
    options = {"lower_bound": damping, "iterations": iterations}
    return restore(_triton_newton_schulz.inverse_root(deflated.A, 1, **options), deflated)


def _by_eigh(A: Tensor) -> Tensor:
    w, Q = torch.linalg.eigh(A)
    with full_precision(DEVICE.type):
        return (Q / w[..., None, :]) @ Q.mT


def apply_cases(N: int, m: int, n_blocks: int, b: int) -> Iterator[KernelCase]:
    """Compare implementations of M = G P for N layers, with P in blocks of width b.

    The layers' G and P are tensors of their own, as in training, so that the Triton kernel has to
    copy them. The contender `bmm` multiplies all blocks of all layers as one batch, without the
    copies.
    """
    G, P = randn(N, m, n_blocks * b), mirror_(randn(N, n_blocks, b, b))
    Gs, Ps = [each.clone() for each in G], [each.clone() for each in P]

    def triton(precision: Precision) -> Tensor:
        return _triton_apply.apply(torch.stack(Gs), torch.stack(Ps), precision=precision)

    contenders = {
        "bmm": partial(_bmm, G, P),
        "layer by layer": lambda: list(map(apply_P, Gs, Ps)),
        "triton tf32x3": partial(triton, precision="tf32x3"),
        "triton bf16x3": partial(triton, precision="bf16x3"),
        "triton ieee": partial(triton, precision="ieee"),
    }
    exact = partial(_bmm, G.double(), P.double())
    yield KernelCase(f"apply N={N} m={m} blocks={n_blocks} b={b}", contenders, exact)


def _bmm(G: Tensor, P: Tensor) -> Tensor:
    (N, m, d), (_, n_blocks, b, _) = G.shape, P.shape
    with full_precision(DEVICE.type):
        slices = G.view(N, m, n_blocks, b).transpose(1, 2)  # (N, n_blocks, m, b)
        return (slices @ P).transpose(1, 2).reshape(N, m, d)


def orthogonalize_cases(N: int, m: int, n: int) -> Iterator[KernelCase]:
    """Compare implementations of Muon's five steps with the same polynomial in float64."""
    G = randn(N, m, n)
    for name, dtype in DTYPES.items():
        contenders = {
            "torch": partial(newton_schulz.orthogonalize, G, dtype=dtype),
            "triton": partial(_triton_newton_schulz.orthogonalize, G, dtype=dtype),
        }
        exact = partial(newton_schulz.orthogonalize, G.double(), dtype=torch.float64)
        yield KernelCase(f"orthogonalize {name} {N}x{m}x{n}", contenders, exact)


CASES: dict[str, Callable[..., Iterator[KernelCase]]] = {
    "gram": gram_cases,
    "inverse": inverse_cases,
    "apply": apply_cases,
    "orthogonalize": orthogonalize_cases,
}


def cases(arguments: argparse.Namespace) -> Iterator[KernelCase]:
    sizes = TINY if arguments.tiny else SIZES
    for operation in arguments.operations:
        for size in sizes[operation]:
            yield from CASES[operation](*size)


def measure(case: KernelCase, *, rounds: int, seconds: float = SECONDS) -> dict[str, Any]:
    """Return the row of one case: times, ratios and errors of its contenders.

    After three rounds, no new round starts once `seconds` have passed.
    """
    exact = case.exact()
    errors = {}
    for name, work in case.contenders.items():  # the first call compiles
        found = work()
        found = torch.stack(found) if isinstance(found, list) else found
        errors[name] = ((found - exact).norm() / exact.norm()).item()
    del exact, found
    times = interleaved(case.contenders, DEVICE, rounds=rounds, seconds=seconds)
    return {"case": case.name, "error": errors, **compared(times)}


def describe(row: dict[str, Any]) -> str:
    """Format the milliseconds, the ratio and the error of every contender."""
    texts = (
        f"{name} {ms:.3f} ms ({row['ratio'][name]:.2f}, error {row['error'][name]:.0e})"
        for name, ms in row["ms"].items()
    )
    return "  ".join([row["case"], *texts])


def main() -> None:
    arguments = parse_operations(
        *("kernels", __doc__, CASES),
        rounds=50,
        tiny="measure small matrices, in one round",
        has_gpu=DEVICE.type == "cuda",
    )
    measure_case = partial(measure, rounds=arguments.rounds)
    rows = measure_all(cases(arguments), measure_case, describe, arguments.out)
    if inaccurate := [row["case"] for row in rows if not is_accurate(row)]:
        print(f"error: above the error tolerance: {'; '.join(inaccurate)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
