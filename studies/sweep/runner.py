"""Points run side by side, each in a worker process; their records come as they are ready."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from studies.stats.analysis import Record
from studies.sweep.run_cache import read_record


class HasFolder(Protocol):
    """A point, as far as this file knows it: its record is `record.json` there."""

    @property
    def folder(self) -> Path: ...


class Runner:
    """Runs points side by side, a worker process and a thread each; keeps their records.

    An exception inside the `with` block ends the workers at once; `run` then raises in all threads.

    Args:
        name: of the progress bar.
        work: what a worker does with a point: leave its record. Importable by name.
        line: a record in a line, for the reader.
        total: points, if that is known.
    """

    def __init__(
        self,
        name: str,
        workers: int,
        work: Callable[[Any], Any],
        line: Callable[[Record], str],
        total: int | None = None,
    ) -> None:
        self.records: dict[Path, Record] = {}
        self._work, self._line = work, line
        context = get_context("spawn")
        ours, self._alive = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(workers, context, start_worker, (ours,))
        self._bar = tqdm(desc=name, unit="run", total=total, disable=not sys.stderr.isatty())

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        self._alive.close()  # workers end, whatever they are at
        self._pool.shutdown()
        self._bar.close()

    def run(self, points: Sequence[HasFolder]) -> list[Record]:
        """The records of these points, in order; those of points that ran before are read."""
        futures = [self._pool.submit(_run, self._work, point) for point in points]
        for point, future in zip(points, futures, strict=True):
            future.add_done_callback(partial(self._keep, point))
        for future in futures:
            future.result()
        return [read_record(point.folder) for point in points]

    def _keep(self, point: HasFolder, future: Future[None]) -> None:
        if not future.cancelled() and not future.exception():
            self.records[point.folder] = read_record(point.folder)
            self._bar.update()
            tqdm.write(self._line(self.records[point.folder]), file=sys.stdout)


def _run(work: Callable[[Any], Any], point: HasFolder) -> None:
    """In a worker. The record stays on disk: a worker may end at any time, but not mid-message."""
    work(point)


def start_worker(parent: Connection) -> None:
    """For a worker: one thread for a point; it ends when the other end of `parent` is closed.

    That happens at the latest when the parent is killed. Ctrl-C is for the parent to answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()


def _end_with(parent: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        parent.recv()
    os._exit(1)
