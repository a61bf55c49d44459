"""What deflation saves, and how exact it is, on the covariances of a training run. Needs no GPU.

    python -m bench.deflation [--width 128] [--layers 4] [--steps 41] [--out FILE]

A GPT of the demo's shape is trained on `pystdlib` by DoPr-Muon. In the first three steps and then
in every 10th, each Σ is inverted by Newton-Schulz, plain and deflated, in fp32 and in the bf16x3 of
the Triton kernels, with as many iterations as Triton takes; U is carried along. Of each γ and input
width, median and worst: upper bound / γ̄, iterations, the error of M = G P; and how many matrices
the iterations missed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.timing import facts, write_rows
from data.dataset import open_dataset
from data.loader import train_batches
from eval.command import command_parser
from model import GPT, GPTConfig
from optim import ActivationPreconditioner
from optim.build import build_optimizers
from optim.kernels.cholesky import WANTED_ERROR
from optim.kernels.deflation import (
    NARROWEST,
    deflate,
    deflated_condition_bound,
    first_deflation_basis,
    restore,
)
from optim.kernels.gram import mirror_
from optim.kernels.newton_schulz import newton_error, newton_iterations, scaled_step, upper_bound

GAMMAS = (0.1, 0.05, 0.01)


def statistics(width: int, layers: int, steps: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, Σ (d, d), G (d_out, d)) of every layer that is wide enough, as training goes on."""
    torch.manual_seed(0)
    dataset = open_dataset("pystdlib")
    shape: dict[str, Any] = {"n_layer": layers, "n_head": width // 32, "n_embd": width}
    model = GPT(
        GPTConfig(vocab_size=dataset.tokenizer.n_vocab, block_size=128, bias=False, **shape)
    )
    numbers = {"optimizer": "muon", "lr": 1e-2, "aux_lr": 4e-3, "weight_decay": 0.1, "beta1": 0.9}
    optimizers = build_optimizers(model, beta2=0.95, eps=1e-8, momentum=0.95, **numbers)
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
    """A B, symmetric; in bf16x3 as `kernels._triton_tiles.multiply_add`."""
    if not bf16x3:
        return mirror_(A @ B)
    (a, a_low), (b, b_low) = (
        (high := X.bfloat16().float(), (X - high).bfloat16().float()) for X in (A, B)
    )
    return mirror_(a @ b + (a @ b_low + a_low @ b))


def inverse(A: Tensor, damping: Tensor, iterations: int, *, bf16x3: bool) -> Tensor:
    """A⁻¹ (d, d) by the iteration of `kernels._triton_newton_schulz`."""
    upper = upper_bound(A)
    X, M, low = torch.eye(len(A)) / upper, A / upper, damping / upper
    for _ in range(iterations):
        a, c, low = scaled_step(low, 1)
        X = a * X - a * c * product(X, M, bf16x3=bf16x3)
        M = a * M - a * c * product(M, M, bf16x3=bf16x3)
    return X * (2 / (1 + low))


def measured(sigma: Tensor, G: Tensor, gamma: float, U: Tensor) -> dict[str, float]:
    """The numbers of one matrix, U (d, k) is updated in place."""
    d = len(sigma)
    damping = gamma * sigma.diagonal().mean()
    A = sigma + damping * torch.eye(d)
    A64 = sigma.double() + damping.double() * torch.eye(d)
    exact = torch.linalg.solve(A64, G.double().mT).mT
    deflated = deflate(sigma[None], damping[None], U[None])
    U.copy_(deflated.U[0])
    both = {
        "plain": (A, d / gamma),
        "deflated": (deflated.A[0], deflated_condition_bound(d / gamma)),
    }
    numbers = {}
    for kind, (A, condition_bound) in both.items():
        iterations, condition = (
            newton_iterations(condition_bound + d**0.5, 1),
            upper_bound(A) / damping,
        )
        is_missed = newton_error(condition, 1, iterations) > WANTED_ERROR
        numbers |= {f"{kind} condition": condition.item(), f"{kind} iterations": iterations}
        numbers[f"{kind} missed"] = is_missed.item()
        for precision, bf16x3 in (("fp32", False), ("bf16x3", True)):
            X = inverse(A, damping, iterations, bf16x3=bf16x3)
            P = restore(X[None], deflated)[0] if kind == "deflated" else X
            error = (G.double() @ P.double() - exact).norm() / exact.norm()
            numbers[f"{kind} error {precision}"] = error.item()
    return numbers


def main() -> None:
    parser = command_parser("bench.deflation", __doc__)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=41)
    parser.add_argument("--out", type=Path, help="write the result as JSON here")
    arguments = parser.parse_args()
    found, deflation_basis = defaultdict(list), {}
    for name, sigma, G in statistics(arguments.width, arguments.layers, arguments.steps):
        for gamma in GAMMAS:
            U = deflation_basis.setdefault((name, gamma), first_deflation_basis(sigma, 1))
            found[gamma, len(sigma)].append(measured(sigma, G, gamma, U))
    rows: list[dict[str, Any]] = []
    for (gamma, d), numbers in sorted(found.items(), reverse=True):
        row = {"gamma": gamma, "d": d, "matrices": len(numbers)}
        for key in numbers[0]:
            values = [each[key] for each in numbers]
            row[key] = sum(values) if "missed" in key else [median(values), max(values)]
        rows.append(row)
        print(*(f"{key} {value}" for key, value in row.items()), sep="  ", flush=True)
    write_rows(arguments.out, facts(torch.device("cpu")), rows)


if __name__ == "__main__":
    main()
