"""The cases of bench.first.correctness: each Triton kernel and its result in float64.

The kernels compute in the precisions that DoPr uses on a GPU, and in those that the benchmarks
compare. The shapes are those of GPT-2 124M and odd ones, which fill no tile.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.kernels import GAMMA, activations, by_deflation, randn
from bench.timing import DEVICE
from optim.kernels import _triton_apply, _triton_gram, _triton_newton_schulz, gram, newton_schulz
from optim.kernels._triton_symmetric import CONFIGS as SYMMETRIC
from optim.kernels._triton_symmetric import symmetric_product
from optim.kernels.deflation import DEFLATION_RANK, NARROWEST, deflated_condition_bound
from optim.kernels.newton_schulz import newton_iterations
from optim.kernels.symmetric import mirror_

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FULL: dict[str, list[Any]] = {
    "gram": [  # sequences, tokens of a sequence, blocks, width of a block, token stride
        *((8, 1024, 1, 768, 1), (8, 1024, 1, 3072, 1), (8, 1024, 4, 768, 8)),
        *((3, 333, 3, 259, 2), (5, 77, 1, 130, 1), (2, 7, 2, 33, 11)),
    ],
    "symmetric": [(2, 768, 768), (2, 768, 3072), (1, 3072, 768), (3, 130, 77)],  # matrices, d, k
    "apply": [  # layers, d_out, blocks, width of a block
        *((2, 2304, 1, 768), (2, 768, 4, 768), (2, 768, 1, 3072), (3, 65, 3, 37)),
    ],
    "orthogonalize": [(2, 768, 768), (1, 3072, 768), (1, 768, 3072), (3, 130, 77)],  # matrices
    "inverse": [(2, 768), (1, 3072), (2, 259), (3, 37)],  # matrices, d
}
TINY: dict[str, list[Any]] = {
    "gram": [(2, 13, 2, 20, 2), (1, 20, 1, 16, 1)],
    "symmetric": [(2, 24, 20)],
    "apply": [(2, 12, 2, 20)],
    "orthogonalize": [(2, 16, 24)],
    "inverse": [(2, 16)],
}
# Relative errors that rounding explains: above those of bench.kernels.SHIPPED, which bound the norm
# alone, and far below those of a wrong index or mask.
GRAM_TOLERANCE = 2e-4
SYMMETRIC_TOLERANCE = {"bf16": 8e-3, "bf16x3": 1e-4, "tf32": 2e-3, "ieee": 1e-5}
APPLY_TOLERANCE = {"tf32x3": 5e-5, "bf16x3": 1e-4, "ieee": 1e-5}
ORTHOGONALIZE_TOLERANCE = {torch.bfloat16: 0.2, torch.float32: 1e-3}
INVERSE_FLOOR = {"bf16x3": 1e-7, "ieee": 5e-9}  # times the condition number
DEFLATED_TOLERANCE = 2e-3


class KernelCheck(NamedTuple):
    """A kernel on fixed inputs: its results, their exact values, and the largest relative error."""

    name: str
    tolerance: float
    compute: Callable[[], list[Tensor]]
    exact: Callable[[], list[Tensor]]
    is_symmetric: bool = False  # whether the first result must be


def gram_checks(B: int, T: int, blocks: int, b: int, stride: int) -> Iterator[KernelCheck]:
    """Check S <- β S + α Σ z zᵀ, alone, with column sums, and over the unmasked tokens only.

    To save compilations, odd widths are not checked without column sums, and fp16 is checked at odd
    widths only.
    """
    is_odd = b % 16 > 0
    for dtype in DTYPES if is_odd else (torch.bfloat16, torch.float32):
        z = randn(B, T, blocks * b, dtype=dtype)
        S = mirror_(randn(blocks, b, b))
        shape = f"{_name(dtype)} {B}x{T} blocks={blocks} b={b} stride={stride}"
        for has_columns in (True,) if is_odd else (False, True):
            check = partial(_gram, S=S, z=z, stride=stride, has_columns=has_columns)
            exact = partial(check, gram.gram_, S=S.double(), z=z.double())
            name = f"gram {shape} columns={has_columns}"
            yield KernelCheck(name, GRAM_TOLERANCE, partial(check, _triton_gram.gram_), exact, True)
        masked = partial(_masked_gram, z=z, blocks=blocks, stride=stride)
        exact = partial(masked, z=z.double(), backend="torch")
        yield KernelCheck(
            f"gram masked {shape}", GRAM_TOLERANCE, partial(masked, backend="triton"), exact, True
        )


def _gram(
    gram_: Callable[..., int], *, S: Tensor, z: Tensor, stride: int, has_columns: bool
) -> list[Tensor]:
    S, sums = S.clone(), S.new_zeros(z.shape[-1])
    factors = {"beta": 0.75, "alpha": 0.5, "stride": stride, "offset": 5}
    gram_(S, z, **factors, column_sums=sums if has_columns else None)
    return [S, sums] if has_columns else [S]


def _masked_gram(*, z: Tensor, blocks: int, stride: int, backend: str) -> list[Tensor]:
    """Accumulate tokens of which every third has no gradient, and return all that is counted."""
    dtype, d = torch.promote_types(z.dtype, torch.float32), z.shape[-1]
    S = torch.zeros(blocks, d // blocks, d // blocks, dtype=dtype, device=DEVICE)
    count, sums = S.new_zeros(()), S.new_zeros(2, d + 1)
    grad_y = torch.ones(*z.shape[:-1], 4, dtype=z.dtype, device=DEVICE)
    grad_y.view(-1, 4)[::3] = 0
    offset = torch.full((), 2, dtype=torch.int64, device=DEVICE)
    gram.accumulate_gram(
        *(S, count, z, offset, torch.tensor(False), stride, backend),
        grad_y=grad_y,
        column_sums=sums,
    )
    return [S, sums, count[None]]


def symmetric_checks(N: int, d: int, k: int) -> Iterator[KernelCheck]:
    """Check α A Aᵀ + β C + γ I in every precision, with and without C."""
    for dtype, precision in SYMMETRIC:
        A, C = randn(N, d, k, dtype=dtype), mirror_(randn(N, d, d)).to(dtype)
        numbers = {"alpha": 0.5, "beta": -2.0, "gamma": 3.0}
        for has_C in (False, True):
            added = C if has_C else None
            kernel = partial(symmetric_product, A, A, C=added, precision=precision, **numbers)
            exact = partial(_symmetric, A.double(), added, **numbers)
            name = f"symmetric {precision} {N}x{d}x{k} C={has_C}"
            tolerance = SYMMETRIC_TOLERANCE[precision]
            yield KernelCheck(name, tolerance, _listed(kernel), _listed(exact), True)


def _symmetric(A: Tensor, C: Tensor | None, *, alpha: float, beta: float, gamma: float) -> Tensor:
    product = alpha * A @ A.mT + gamma * torch.eye(A.shape[1], dtype=A.dtype, device=DEVICE)
    return product if C is None else product + beta * C.double()


def apply_checks(N: int, m: int, blocks: int, b: int) -> Iterator[KernelCheck]:
    """Check M = G P for a G in rows and for a transposed one."""
    P = randn(N, blocks, b, b)
    rows = randn(N, m, blocks * b)
    for layout, G in {"rows": rows, "columns": rows.mT.contiguous().mT}.items():
        exact = partial(_apply, G.double(), P.double())
        for precision in _triton_apply.CONFIGS:
            kernel = partial(_triton_apply.apply, G, P, precision=precision)
            name = f"apply {precision} N={N} m={m} blocks={blocks} b={b} {layout}"
            yield KernelCheck(name, APPLY_TOLERANCE[precision], _listed(kernel), _listed(exact))


def _apply(G: Tensor, P: Tensor) -> Tensor:
    slices = zip(G.split(P.shape[-1], dim=-1), P.unbind(1), strict=True)
    return torch.cat([g @ p for g, p in slices], dim=-1)


def orthogonalize_checks(N: int, m: int, n: int) -> Iterator[KernelCheck]:
    """Check Muon's five steps against the same polynomials in float64."""
    G = randn(N, m, n)
    exact = partial(newton_schulz.orthogonalize, G.double(), dtype=torch.float64)
    for dtype, tolerance in ORTHOGONALIZE_TOLERANCE.items():
        kernel = partial(_triton_newton_schulz.orthogonalize, G, dtype=dtype)
        name = f"orthogonalize {_name(dtype)} {N}x{m}x{n}"
        yield KernelCheck(name, tolerance, _listed(kernel), _listed(exact))


def inverse_checks(N: int, d: int) -> Iterator[KernelCheck]:
    """Check (Σ + γ̄ I)^(-1/p) by Newton-Schulz, and for p = 1 also with deflation."""
    z = activations(N, 4 * d, d).double()
    sigma = mirror_(z.mT @ z / (4 * d)).float()
    damping = GAMMA * sigma.diagonal(dim1=-2, dim2=-1).mean(-1)  # (N,)
    A = sigma + damping[:, None, None] * torch.eye(d, device=DEVICE)
    bound, margin, eigen = d / GAMMA, d**0.5, torch.linalg.eigh(A.double())
    for p in (1, 2, 4):
        exact = _listed(partial(_root, *eigen, -1 / p))
        options = {"lower_bound": damping, "iterations": newton_iterations(bound + margin, p)}
        for precision, floor in INVERSE_FLOOR.items():
            kernel = partial(_triton_newton_schulz.inverse_root, A, p, **options)
            kernel = _listed(partial(kernel, precision=precision))
            name, tolerance = f"inverse p={p} {precision} {N}x{d}", 2e-4 + 4 * floor * bound
            yield KernelCheck(name, tolerance, kernel, exact, True)
    if d >= NARROWEST:
        U = torch.linalg.qr(randn(N, d, DEFLATION_RANK))[0]
        iterations = newton_iterations(deflated_condition_bound(bound) + margin, 1)
        kernel = _listed(partial(by_deflation, sigma, damping, U, iterations))
        exact = _listed(partial(_root, *eigen, -1))
        yield KernelCheck(f"inverse deflated {N}x{d}", DEFLATED_TOLERANCE, kernel, exact, True)


def _root(w: Tensor, Q: Tensor, power: float) -> Tensor:
    return Q * w[:, None] ** power @ Q.mT


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(work: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
    return lambda: [work()]


CASES: dict[str, Callable[..., Iterator[KernelCheck]]] = {
    "gram": gram_checks,
    "symmetric": symmetric_checks,
    "apply": apply_checks,
    "orthogonalize": orthogonalize_checks,
    "inverse": inverse_checks,
}
