"""Call a function for every task in a pool of processes with one thread each."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import torch
from tqdm import tqdm

Task = TypeVar("Task")
Result = TypeVar("Result")


def map_in_pool(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, about: str = ""
) -> list[Result]:
    """Return the results in the order of the tasks, and show progress."""
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        return list(tqdm(pool.map(function, tasks), total=len(tasks), desc=about))
