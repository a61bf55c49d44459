"""Call a function for every task in a pool of processes with one thread each."""

import argparse
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TypeVar

import torch
from tqdm import tqdm

from eval.command import command_parser, output_file, positive_int

Task = TypeVar("Task")
Result = TypeVar("Result")


def pool_parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that all studies in a pool have: --out and --workers."""
    parser = command_parser(module, about)
    parser.add_argument("--out", type=output_file, required=True)
    about_workers = "runs at a time, a thread each"
    parser.add_argument("--workers", type=positive_int, default=2, help=about_workers)
    return parser


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Open a pool of processes with one thread each.

    An exception inside the `with` block ends the processes at once, even in the middle of a task.
    They also end when this process is killed.
    """
    context = get_context("spawn")
    parent, alive = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (parent,))
    try:
        yield pool
        pool.shutdown()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        alive.close()
        pool.shutdown()


def _start_worker(parent: Connection) -> None:
    """Initialise a worker: use one thread, and exit when the other end of `parent` is closed.

    That end closes at the latest when the parent is killed. Ctrl-C is left to the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_exit_with, args=[parent], daemon=True).start()


def _exit_with(parent: Connection) -> None:
    with suppress(EOFError, OSError):
        parent.recv()
    os._exit(1)


def iterate_in_pool(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, about: str = ""
) -> Iterator[Result]:
    """Yield the results in the order of the tasks, and show progress."""
    if not tasks:
        return
    with worker_pool(workers) as pool:
        yield from tqdm(pool.map(function, tasks), total=len(tasks), desc=about)


def map_in_pool(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, about: str = ""
) -> list[Result]:
    """Return the results in the order of the tasks, and show progress."""
    return list(iterate_in_pool(function, tasks, workers, about))
