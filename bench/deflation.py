"""Measure what deflation saves, and its accuracy, on covariances of a training run. CPU only.

    python -m bench.deflation [--width 128] [--layers 4] [--steps 41] [--out FILE]

Trains a GPT of the demo's shape on `pystdlib` with DoPr-Muon. In the first three steps, and then in
every 10th step, each Σ is inverted by Newton-Schulz, plain and deflated, in fp32 and in the bf16x3
of the Triton kernels, with as many iterations as the Triton kernels use. The deflation basis U is
carried from step to step. For each γ and input width, the result has the median and the maximum
over matrices of the upper bound / γ̄, of the iterations and of the error of M = G P, and the number
of matrices for which the iterations did not suffice.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.results import write_rows
from bench.timing import facts
from data.dataset import open_dataset
from data.loader import train_batches
from eval.command import command_parser
from model import GPT, GPTConfig
from optim import ActivationPreconditioner
from optim.build import build_optimizers
from optim.kernels.damped_root import WANTED_ERROR
from optim.kernels.deflation import (
    NARROWEST,
    Deflated,
    deflate,
    deflated_condition_bound,
    first_deflation_basis,
    restore,
)
from optim.kernels.newton_schulz import newton_error, newton_iterations, scaled_step, upper_bound
from optim.kernels.symmetric import mirror_

GAMMAS = (0.1, 0.05, 0.01)


def training_statistics(
    width: int, layers: int, steps: int
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Train, and yield (name, Σ (d, d), G (d_out, d)) of every layer that is wide enough."""
    torch.manual_seed(0)
    dataset = open_dataset("pystdlib")
    shape: dict[str, Any] = {"n_layer": layers, "n_head": width // 32, "n_embd": width}
    model = GPT(
        GPTConfig(vocab_size=dataset.tokenizer.n_vocab, block_size=128, bias=False, **shape)
    )
    options: dict[str, Any] = {"optimizer": "muon", "weight_decay": 0.1, "momentum": 0.95}
    options |= {"lr": 1e-2, "aux_lr": 4e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    optimizers = build_optimizers(model, **options)
    preconditioner = ActivationPreconditioner(model, gamma=0.1).attach(*optimizers)
    sizes = {"batch_size": 32, "micro_batch_size": 32, "block_size": 128}
    batches = train_batches(dataset, **sizes, seed=0, start_step=0, workers=0)
    for step in range(steps):
        for x, y in next(batches):
            model(x, y)[1].backward()
        for layer in preconditioner.layers:
            if layer.covered.d_in >= NARROWEST and (step < 3 or step % 10 == 0):
                sigma = (layer.capture.gram / layer.capture.count)[0]
                assert layer.covered.weight.grad is not None
                yield layer.name, sigma, layer.covered.weight.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def product(A: Tensor, B: Tensor, *, bf16x3: bool) -> Tensor:
    """Return the symmetric product A B, in fp32 or in bf16x3.

    bf16x3 multiplies as `kernels._triton_tiles.multiply_add` does.
    """
    if not bf16x3:
        return mirror_(A @ B)
    (A_high, A_low), (B_high, B_low) = (
        (high := X.bfloat16().float(), (X - high).bfloat16().float()) for X in (A, B)
    )
    return mirror_(A_high @ B_high + (A_high @ B_low + A_low @ B_high))


def inverse(A: Tensor, damping: Tensor, iterations: int, *, bf16x3: bool) -> Tensor:
    """Return A⁻¹ (d, d) by the iteration of `kernels._triton_newton_schulz`."""
    upper = upper_bound(A)
    X, M, low = torch.eye(len(A)) / upper, A / upper, damping / upper
    for _ in range(iterations):
        a, c, low = scaled_step(low, 1)
        X = a * X - a * c * product(X, M, bf16x3=bf16x3)
        M = a * M - a * c * product(M, M, bf16x3=bf16x3)
    return X * (2 / (1 + low))


def measure(sigma: Tensor, G: Tensor, gamma: float, U: Tensor) -> dict[str, float]:
    """Return the numbers of one matrix. Updates U (d, k) in place."""
    d = len(sigma)
    damping = gamma * sigma.diagonal().mean()
    A64 = sigma.double() + damping.double() * torch.eye(d)
    exact = torch.linalg.solve(A64, G.double().mT).mT
    deflated = deflate(sigma[None], damping[None], U[None])
    U.copy_(deflated.U[0])
    plain = sigma + damping * torch.eye(d)
    bound = d / gamma
    return inversion_numbers("plain", plain, bound, damping, G, exact, None) | inversion_numbers(
        "deflated", deflated.A[0], deflated_condition_bound(bound), damping, G, exact, deflated
    )


def inversion_numbers(
    kind: str,
    A: Tensor,
    condition_bound: float,
    damping: Tensor,
    G: Tensor,
    exact: Tensor,
    deflated: Deflated | None,
) -> dict[str, float]:
    """Return the condition, the iterations and the errors of inverting A (d, d).

    `deflated` restores the full inverse if A is a deflated matrix.
    """
    iterations = newton_iterations(condition_bound + len(A) ** 0.5, 1)
    condition = upper_bound(A) / damping
    is_missed = newton_error(condition, 1, iterations) > WANTED_ERROR
    numbers = {f"{kind} condition": condition.item(), f"{kind} iterations": iterations}
    numbers[f"{kind} missed"] = is_missed.item()
    for precision, bf16x3 in (("fp32", False), ("bf16x3", True)):
        X = inverse(A, damping, iterations, bf16x3=bf16x3)
        P = restore(X[None], deflated)[0] if deflated else X
        error = (G.double() @ P.double() - exact).norm() / exact.norm()
        numbers[f"{kind} error {precision}"] = error.item()
    return numbers


def summary(gamma: float, d: int, matrices: list[dict[str, float]]) -> dict[str, Any]:
    """Return the row of one γ and input width: medians and maxima over matrices, or sums."""
    row: dict[str, Any] = {"gamma": gamma, "d": d, "matrices": len(matrices)}
    for key in matrices[0]:
        values = [numbers[key] for numbers in matrices]
        row[key] = sum(values) if "missed" in key else [median(values), max(values)]
    return row


def main() -> None:
    parser = command_parser("bench.deflation", __doc__)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=41)
    parser.add_argument("--out", type=Path, help="write the result to this file, as JSON")
    arguments = parser.parse_args()
    numbers, bases = defaultdict(list), {}
    for name, sigma, G in training_statistics(arguments.width, arguments.layers, arguments.steps):
        for gamma in GAMMAS:
            U = bases.setdefault((name, gamma), first_deflation_basis(sigma, 1))
            numbers[gamma, len(sigma)].append(measure(sigma, G, gamma, U))
    rows = [
        summary(gamma, d, matrices)
        for (gamma, d), matrices in sorted(numbers.items(), reverse=True)
    ]
    for row in rows:
        print(*(f"{key} {value}" for key, value in row.items()), sep="  ", flush=True)
    write_rows(arguments.out, facts(torch.device("cpu")), rows)


if __name__ == "__main__":
    main()
