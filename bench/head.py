"""Is a head of 50,257 ids faster with rows of zeros up to 50,304? model.tied_head believes so.

    python -m bench.head [--rounds 20] [--tiny] [--out FILE]

Loss and gradient of 16,384 tokens by the weights of GPT-2 124M's head and by its inputs, compiled,
under bf16 autocast, in turns: the head as it is, over whole tiles, and, as a bound, with 50,304
ids. Reported: median milliseconds, the median over rounds of the ratio to the head as it is (below
1 is faster), and the error of the gradient relative to float64. Needs a GPU; --tiny runs anywhere.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.arguments import at_least_one
from bench.timing import DEVICE, Work, compared, facts, interleaved, write_rows
from eval.command import command_parser
from model import TILE, aligned_linear

GPT2, TINY = (16_384, 768, 50_257), (32, 16, 65)  # tokens, width, ids
Head = Callable[[Tensor, Tensor], Tensor]


def gradient(head: Head, x: Tensor, W: Tensor, y: Tensor) -> Work:
    """What makes the gradient by W (V, C), and that by x (n, C), of the mean loss of targets y."""
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=x.dtype == torch.float32)

    def loss() -> Tensor:
        with autocast:
            return F.cross_entropy(head(x, W), y)

    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    compiled = torch.compile(loss, backend=backend, dynamic=False)  # or W's rows become a symbol
    return lambda: torch.autograd.grad(compiled(), (W, x))[0]


def measure(n: int, width: int, n_ids: int, *, rounds: int) -> dict:
    """The row of the result."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    padded = -(-n_ids // TILE) * TILE
    where = {"generator": generator, "device": DEVICE}
    x = torch.randn(n, width, **where).requires_grad_()
    W = (0.02 * torch.randn(padded, width, **where)).requires_grad_()
    y = torch.randint(n_ids, (n,), **where)
    own = W.detach()[:n_ids].clone().requires_grad_()
    contenders = {
        "as it is": gradient(F.linear, x, own, y),
        "whole tiles": gradient(aligned_linear, x, own, y),
        f"{padded:,} ids": gradient(F.linear, x, W, y),
    }
    x64, own64 = (each.detach().double().requires_grad_() for each in (x, own))
    exact = torch.autograd.grad(F.cross_entropy(F.linear(x64, own64), y), own64)[0]
    found = {name: work() for name, work in contenders.items()}  # the first call compiles
    same_model = [name for name, G in found.items() if len(G) == n_ids]
    error = {k: ((found[k] - exact).norm() / exact.norm()).item() for k in same_model}
    del exact, found, x64, own64
    times = interleaved(contenders, DEVICE, rounds=rounds, seconds=30)
    return {"tokens": n, "width": width, "ids": n_ids, "error": error, **compared(times)}


def main() -> None:
    parser = command_parser("bench.head", __doc__)
    parser.add_argument("--rounds", type=at_least_one, default=20)
    parser.add_argument("--tiny", action="store_true", help="a small head, three rounds")
    parser.add_argument("--out", type=Path, help="write the result as JSON here")
    arguments = parser.parse_args()
    if not (arguments.tiny or DEVICE.type == "cuda"):
        parser.error("needs a CUDA GPU; --tiny runs without one")
    row = measure(
        *(TINY if arguments.tiny else GPT2), rounds=3 if arguments.tiny else arguments.rounds
    )
    for name, ms in row["ms"].items():
        print(f"{name:12} {ms:.3f} ms ({row['ratio'][name]:.3f})")
    write_rows(arguments.out, facts(DEVICE), [row])


if __name__ == "__main__":
    main()
