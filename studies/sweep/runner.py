"""Run trials side by side in worker processes, and collect their records as they finish."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from studies.pool import worker_pool
from studies.stats.records import Record
from studies.sweep.run_cache import read_record


class HasFolder(Protocol):
    """A trial whose record is `folder`/record.json."""

    @property
    def folder(self) -> Path: ...


class Runner:
    """Run trials side by side, each in a worker process with one thread, and keep their records.

    An exception inside the `with` block ends the workers at once; `run` then raises in all threads.

    Args:
        name: name of the progress bar.
        work: function that runs a trial and writes its record. It must be importable by name.
        line: function that describes a record in one line, which is printed.
        total: number of trials, if it is known.
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
        self._opening = worker_pool(workers)
        self._bar = tqdm(desc=name, unit="run", total=total, disable=not sys.stderr.isatty())

    def __enter__(self) -> "Runner":
        self._pool = self._opening.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._opening.__exit__(*exception)
        self._bar.close()

    def run(self, trials: Sequence[HasFolder]) -> list[Record]:
        """Run the trials that have no record yet; return all their records, in order."""
        futures = [self._pool.submit(_run, self._work, trial) for trial in trials]
        for trial, future in zip(trials, futures, strict=True):
            future.add_done_callback(partial(self._keep, trial))
        for future in futures:
            future.result()
        return [read_record(trial.folder) for trial in trials]

    def _keep(self, trial: HasFolder, future: Future[None]) -> None:
        if not future.cancelled() and not future.exception():
            self.records[trial.folder] = read_record(trial.folder)
            self._bar.update()
            tqdm.write(self._line(self.records[trial.folder]), file=sys.stdout)


def _run(work: Callable[[Any], Any], trial: HasFolder) -> None:
    """Run a trial in a worker.

    The record is not sent back: the worker may be killed at any time, and a message cut short would
    break the pool. The parent reads it from disk.
    """
    work(trial)
