"""Call a function for every task in a pool of processes, and keep the rows of earlier commands."""

import argparse
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from eval.command import command_parser

Task = TypeVar("Task")
Result = TypeVar("Result")
Key = TypeVar("Key")
Row = dict[str, Any]


def pool_parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that all studies in a pool have: --out and --workers."""
    parser = command_parser(module, about)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    return parser


def kept_rows(path: Path, key_of: Callable[[Row], Key]) -> dict[Key, Row]:
    """Return {key: row} of the rows that earlier commands wrote to a JSON file; {} without one."""
    if not path.exists():
        return {}
    return {key_of(row): row for row in json.loads(path.read_text())["rows"]}


def map_in_pool(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, about: str = ""
) -> list[Result]:
    """Return the results in the order of the tasks, and show progress."""
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        return list(tqdm(pool.map(function, tasks), total=len(tasks), desc=about))
