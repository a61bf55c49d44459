"""Call a function for every task in a pool of processes with one thread each."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from eval.command import command_parser

Task = TypeVar("Task")
Result = TypeVar("Result")


def pool_parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that all studies in a pool have: --out and --workers."""
    parser = command_parser(module, about)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    return parser


def iterate_in_pool(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, about: str = ""
) -> Iterator[Result]:
    """Yield the results in the order of the tasks, and show progress."""
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        yield from tqdm(pool.map(function, tasks), total=len(tasks), desc=about)


def map_in_pool(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, about: str = ""
) -> list[Result]:
    """Return the results in the order of the tasks, and show progress."""
    return list(iterate_in_pool(function, tasks, workers, about))
