"""Run a study in this process and this thread, where its processes are not what is tested."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any


class SynchronousExecutor(Executor):
    """Call every submitted function at once."""

    def __init__(self, *_: Any) -> None:
        """Take the arguments of other executors."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def synchronous_pool(workers: int) -> Iterator[SynchronousExecutor]:
    yield SynchronousExecutor()
