"""Processes that stand by for tests of several: starting some costs seconds, a case does not."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

PRELOAD = ["torch.distributed.fsdp", "torch.distributed.checkpoint", "train", "tests.processes"]
LIMIT_S = 500.0  # of a case; to compile takes minutes on a machine that does other things


class Gang:
    """`size` processes in which functions of a module run, as if torchrun had started them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        pipes = [context.Pipe() for _ in range(self._size)]
        self._ends = [mine for mine, _ in pipes]
        self._processes = [context.Process(target=_serve, args=(end,)) for _, end in pipes]
        for process in self._processes:
            process.start()

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)` returns in processes of rank 0 to size - 1.

        The first error of any of them is raised here, and new processes take their places.
        """
        port = _free_port()
        ends = self._ends[:size]
        for rank, end in enumerate(ends):
            end.send((rank, size, port, function, args))
        results: dict[Any, Any] = {}
        while len(results) < size:
            ready = wait([end for end in ends if end not in results], LIMIT_S)
            problem = None if ready else f"no answer in {LIMIT_S} s"
            for end in ready:
                assert isinstance(end, Connection)
                results[end], problem = end.recv()
                problem = problem and f"rank {ends.index(end)}: {problem}"
                if problem:
                    break
            if problem:
                self.stop()
                self._start()
                raise AssertionError(problem)
        return [results[end] for end in ends]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(end: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    while True:
        rank, size, port, function, args = end.recv()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            end.send((function(*args), None))
        except BaseException:
            end.send((None, traceback.format_exc()))
        if torch.distributed.is_initialized():  # a case that lost a process leaves it behind
            torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
