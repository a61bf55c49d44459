"""Measure whether padding GPT-2's head from 50,257 to 50,304 rows makes it faster.

    python -m bench.head [--rounds 20] [--tiny] [--out FILE]

`model.tied_head` relies on the answer. The benchmark computes the loss of 16,384 tokens and its
gradients by the head's weights and inputs, compiled, under bf16 autocast. Three heads take turns:
50,257 ids as they are, 50,257 ids computed over whole tiles, and 50,304 ids as a bound. The result
has the median milliseconds, the median over rounds of the ratio to the first head (below 1 is
faster), and the error of the gradient relative to float64. Needs a GPU; --tiny runs anywhere.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.arguments import bench_parser
from bench.results import write_rows
from bench.timing import DEVICE, Work, compared, facts, interleaved
from model import TILE, aligned_linear

GPT2, TINY = (16_384, 768, 50_257), (32, 16, 65)  # tokens, width, ids
Head = Callable[[Tensor, Tensor], Tensor]


def gradient(head: Head, x: Tensor, W: Tensor, y: Tensor) -> Work:
    """Return a function that computes the gradients by W (V, C) and x (n, C), and returns W's.

    The loss is the mean cross-entropy of the targets y (n,).
    """
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=x.dtype == torch.float32)

    def loss() -> Tensor:
        with autocast:
            return F.cross_entropy(head(x, W), y)

    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    compiled = torch.compile(loss, backend=backend, dynamic=False)  # keeps W's row count constant
    return lambda: torch.autograd.grad(compiled(), (W, x))[0]


def measure(n: int, width: int, n_ids: int, *, rounds: int) -> dict:
    """Return the row of the result."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    padded = -(-n_ids // TILE) * TILE
    options = {"generator": generator, "device": DEVICE}
    x = torch.randn(n, width, **options).requires_grad_()
    W_padded = (0.02 * torch.randn(padded, width, **options)).requires_grad_()
    y = torch.randint(n_ids, (n,), **options)
    W = W_padded.detach()[:n_ids].clone().requires_grad_()
    contenders = {
        "as it is": gradient(F.linear, x, W, y),
        "whole tiles": gradient(aligned_linear, x, W, y),
        f"{padded:,} ids": gradient(F.linear, x, W_padded, y),
    }
    x64, W64 = (tensor.detach().double().requires_grad_() for tensor in (x, W))
    exact = torch.autograd.grad(F.cross_entropy(F.linear(x64, W64), y), W64)[0]
    gradients = {name: work() for name, work in contenders.items()}  # the first call compiles
    error = {
        name: ((G - exact).norm() / exact.norm()).item()
        for name, G in gradients.items()
        if len(G) == n_ids
    }
    del exact, gradients, x64, W64
    times = interleaved(contenders, DEVICE, rounds=rounds, seconds=30)
    return {"tokens": n, "width": width, "ids": n_ids, "error": error, **compared(times)}


def main() -> None:
    parser = bench_parser("head", __doc__, rounds=20)
    parser.add_argument("--tiny", action="store_true", help="measure a small head in three rounds")
    arguments = parser.parse_args()
    if not (arguments.tiny or DEVICE.type == "cuda"):
        parser.error("needs a CUDA GPU; use --tiny to run without one")
    row = measure(
        *(TINY if arguments.tiny else GPT2), rounds=3 if arguments.tiny else arguments.rounds
    )
    for name, ms in row["ms"].items():
        print(f"{name:12} {ms:.3f} ms ({row['ratio'][name]:.3f})")
    write_rows(arguments.out, facts(DEVICE), [row])


if __name__ == "__main__":
    main()
