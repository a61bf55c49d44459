"""Measure the memory with which each process builds its shards of a model, under FSDP2 on a CPU.

    torchrun --nproc_per_node=4 -m bench.startup [--size gpt2-xl] [--whole] [--out FILE]
    torchrun --nproc_per_node=4 -m bench.startup --init_from FOLDER

The weights are those that train.py starts from: random ones, or those of a Hugging Face folder.
--whole first builds the whole model in every process. The result has, for the process with the most
memory, the peak of its own memory above that before the model, and what it can be compared with:
the bytes of its shards, of the largest parameter and of the whole model. The pages of the folder's
files do not count, because all processes share them and the system drops them when it needs memory.
Runs on Linux only.
"""

import argparse
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from bench.results import write_rows
from bench.timing import facts
from eval.command import command_parser
from eval.hf_import import open_hf
from model import GPT, GPTConfig
from optim.process_group import local
from trainer.build import draw_shards
from trainer.checkpoint.read import load_into
from trainer.parallel import Parallel

SIZES = {  # layers, heads, width
    "tiny": (2, 2, 32),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
SEED = 0
INTERVAL_S = 0.002  # between two looks at the memory


def own_bytes() -> int:
    """Return the resident memory of this process, without the pages of files."""
    status = Path("/proc/self/status").read_text()
    return sum(
        1024 * int(kB) for kB in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", status, re.M)
    )


@contextmanager
def peak_added() -> Iterator[list[int]]:
    """Give a list that holds, at the end of the context, the most that `own_bytes` grew."""
    peak, before, is_done = [0], own_bytes(), Event()

    def watch() -> None:
        while not is_done.wait(INTERVAL_S):
            peak[0] = max(peak[0], own_bytes() - before)

    thread = Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        is_done.set()
        thread.join()


def random_model(parallel: Parallel, size: str, *, is_whole: bool) -> GPT:
    """Return a sharded model with the initial weights that train.py draws."""
    n_layer, n_head, n_embd = SIZES[size]
    config = GPTConfig(
        vocab_size=50304, block_size=1024, n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=False
    )
    torch.manual_seed(SEED)
    with torch.device("cpu" if is_whole else "meta"):
        model = GPT(config)
    parallel.place(model)
    if not is_whole:
        draw_shards(model, SEED)
    return model


def imported_model(parallel: Parallel, folder: Path) -> GPT:
    """Return the sharded model of a Hugging Face folder, as a run with init_from makes it."""
    config, weights = open_hf(folder)
    with torch.device("meta"):
        model = GPT(config)
    parallel.place(model)
    load_into(model, weights, folder)
    return model


def measure(parallel: Parallel, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the row of the process with the most memory."""
    with peak_added() as peak:
        if arguments.init_from:
            model = imported_model(parallel, arguments.init_from)
        else:
            model = random_model(parallel, arguments.size, is_whole=arguments.whole)
    row: dict[str, Any] = {"MiB": peak[0] / 2**20}
    row["shards_MiB"] = sum(local(parameter).nbytes for parameter in model.parameters()) / 2**20
    whole = [parameter.numel() * parameter.element_size() for parameter in model.parameters()]
    row |= {"largest_parameter_MiB": max(whole) / 2**20, "whole_MiB": sum(whole) / 2**20}
    most = max(parallel.gather(row), key=lambda each: each["MiB"])
    size = "init_from" if arguments.init_from else arguments.size
    return {"size": size, "processes": parallel.size, "is_whole": arguments.whole} | most


def main() -> None:
    parser = command_parser("bench.startup", __doc__)
    parser.add_argument("--out", type=Path, help="write the result to this file, as JSON")
    parser.add_argument("--size", choices=SIZES, default="gpt2-xl")
    parser.add_argument("--whole", action="store_true", help="build whole models first")
    parser.add_argument("--init_from", type=Path, help="a Hugging Face folder of a GPT-2")
    arguments = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        parser.error("needs several processes: torchrun --nproc_per_node=4 -m bench.startup")
    with Parallel(torch.device("cpu"), mode="fsdp") as parallel:
        row = measure(parallel, arguments)
        if parallel.is_main:
            print(json.dumps(row, indent=2))
            write_rows(arguments.out, facts(parallel.device), [row])


if __name__ == "__main__":
    main()
