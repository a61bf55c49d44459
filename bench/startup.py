"""Measure the memory with which each process builds its shards of a model, under FSDP2 on a CPU.

    torchrun --nproc_per_node=4 -m bench.startup [--size gpt2-xl] [--whole] [--out FILE]

The weights are those that train.py starts from. --whole first builds the whole model in every
process, as a run with init_from does. The result has, for the process with the most memory, the
peak of its resident memory above that before the model, and what it can be compared with: the bytes
of its shards, of the largest parameter and of the whole model.
"""

import json
import os
import resource
from pathlib import Path
from typing import Any

import torch

from bench.results import write_rows
from bench.timing import facts
from eval.command import command_parser
from model import GPT, GPTConfig
from optim.process_group import local
from trainer.build import draw_shards
from trainer.parallel import Parallel

SIZES = {  # layers, heads, width
    "tiny": (2, 2, 32),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
SEED = 0


def peak_bytes() -> int:
    """Return the largest resident memory of this process until now."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def build(parallel: Parallel, config: GPTConfig, *, is_whole: bool) -> GPT:
    """Return the sharded model with its initial weights."""
    torch.manual_seed(SEED)
    with torch.device("cpu" if is_whole else "meta"):
        model = GPT(config)
    parallel.place(model)
    if not is_whole:
        draw_shards(model, SEED)
    return model


def measure(parallel: Parallel, size: str, *, is_whole: bool) -> dict[str, Any]:
    """Return the row of the process with the most memory."""
    n_layer, n_head, n_embd = SIZES[size]
    config = GPTConfig(
        vocab_size=50304, block_size=1024, n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=False
    )
    before = peak_bytes()
    model = build(parallel, config, is_whole=is_whole)
    row = {"MiB": (peak_bytes() - before) / 2**20}
    row["shards_MiB"] = sum(local(parameter).nbytes for parameter in model.parameters()) / 2**20
    whole = [parameter.numel() * parameter.element_size() for parameter in model.parameters()]
    row |= {"largest_parameter_MiB": max(whole) / 2**20, "whole_MiB": sum(whole) / 2**20}
    most = max(parallel.gather(row), key=lambda each: each["MiB"])
    return {"size": size, "processes": parallel.size, "is_whole": is_whole} | most


def main() -> None:
    parser = command_parser("bench.startup", __doc__)
    parser.add_argument("--out", type=Path, help="write the result to this file, as JSON")
    parser.add_argument("--size", choices=SIZES, default="gpt2-xl")
    parser.add_argument("--whole", action="store_true", help="build whole models first")
    arguments = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        parser.error("needs several processes: torchrun --nproc_per_node=4 -m bench.startup")
    with Parallel(torch.device("cpu"), mode="fsdp") as parallel:
        row = measure(parallel, arguments.size, is_whole=arguments.whole)
        if parallel.is_main:
            print(json.dumps(row, indent=2))
            write_rows(arguments.out, facts(parallel.device), [row])


if __name__ == "__main__":
    main()
