"""Run distributed test cases in processes that stay alive between cases.

Starting a process takes seconds; running another case in it does not.
"""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

PRELOAD = ["torch.distributed.fsdp", "torch.distributed.checkpoint", "train", "tests.processes"]
PRELOAD += ["torch._dynamo", "pytest", "transformers.pytorch_utils", "pytorch_optimizer"]
LIMIT_S = 500.0  # per case; compilation takes minutes on a busy machine


class Gang:
    """`size` processes that run functions as if torchrun had started them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        pipes = [context.Pipe() for _ in range(self._size)]
        self._connections = [parent for parent, _ in pipes]
        self._processes = [context.Process(target=_serve, args=(child,)) for _, child in pipes]
        for process in self._processes:
            process.start()

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` in `size` processes and return the results in order of rank.

        Raises AssertionError with the first error of any process, after replacing all processes.
        """
        port = _free_port()
        connections = self._connections[:size]
        for rank, connection in enumerate(connections):
            connection.send((rank, size, port, function, args))
        results: dict[Any, Any] = {}
        while len(results) < size:
            ready = wait([each for each in connections if each not in results], LIMIT_S)
            problem = None if ready else f"no answer within {LIMIT_S} s"
            for connection in ready:
                assert isinstance(connection, Connection)
                results[connection], error = connection.recv()
                if error:
                    problem = f"rank {connections.index(connection)}: {error}"
                    break
            if problem:
                self.stop()
                self._start()
                raise AssertionError(problem)
        return [results[connection] for connection in connections]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(connection: Connection) -> None:
    """Run the functions that arrive, and send back their results or tracebacks."""
    import torch

    torch.set_num_threads(1)
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    while True:
        rank, size, port, function, args = connection.recv()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            connection.send((function(*args), None))
        except BaseException:
            connection.send((None, traceback.format_exc()))
        if torch.distributed.is_initialized():  # left over by a case in which a process was lost
            torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
