"""Processes decide together without waiting for each other."""

import os
import time
from collections import Counter

import pytest
import torch
from torch import distributed

from data.shards import DataError
from tests.distributed.runs import SETTINGS, main
from tests.tiny import argv
from trainer.parallel import Parallel

pytestmark = pytest.mark.xdist_group("gang")  # the tests share a gang of processes


def test_the_tests_of_a_group_run_in_one_worker(request):
    """pytest-xdist groups tests by this suffix, and says nothing if it cannot."""
    config = request.config
    if hasattr(config, "workerinput") and config.getvalue("loadgroup"):
        assert request.node.nodeid.endswith("@gang")


def started(folder):
    """Start to agree, the first process before the others; return the results and the sum."""
    with Parallel(torch.device("cpu"), timeout_s=60) as parallel:
        if parallel.rank:
            while not (folder / "started").exists():
                time.sleep(0.01)
        finish = parallel.start_on_all_ranks(lambda: [parallel.rank + 1], DataError, sum)
        (folder / "started").touch()
        finish_max = parallel.start_all_reduce_flag(parallel.rank)
        return finish(), finish_max()


def test_a_process_starts_to_agree_without_waiting_for_the_others(gang, tmp_path):
    expected = [(([rank + 1], 6), 2) for rank in range(3)]  # 6 = 1 + 2 + 3
    assert gang.run(3, started, tmp_path) == expected


def counted(arguments: list[str]) -> Counter[tuple[str, int, bool]]:
    """Start a run; count the collectives by name, number of elements, and whether they wait."""
    counts: Counter[tuple[str, int, bool]] = Counter()
    names = [name for name in distributed.distributed_c10d.__all__ if name.startswith("all_")]
    with pytest.MonkeyPatch.context() as patch:
        for name in (*names, "barrier", "broadcast"):
            function = getattr(distributed, name, None)

            def wrapped(*args, _function=function, _name=name, async_op=False, **kwargs):
                counts[_name, getattr(args[0], "numel", int)() if args else 0, not async_op] += 1
                extra = {"async_op": True} if async_op else {}
                return _function(*args, **extra, **kwargs)

            if function:
                patch.setattr(distributed, name, wrapped)
        code, errors = main(arguments)
    assert code == 0, (os.environ["RANK"], errors)
    return counts


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("signum", marks=pytest.mark.slow)])
def test_a_step_that_is_not_logged_waits_for_no_other_process_but_for_its_loss(
    gang, dataset, tmp_path, optimizer
):
    """DDP averages the gradients in C++, which is not counted here."""
    run = {"eval_every": 99, "save_every": 99, "log_every": 99, "optimizer": optimizer}
    counts = {}
    for steps in (3, 5):
        arguments = argv(dataset, tmp_path / str(steps), **SETTINGS | run | {"max_steps": steps})
        counts[steps], _ = gang.run(2, counted, arguments)
    two_steps = counts[5] - counts[3]
    assert two_steps == {
        ("all_reduce", 1, False): 2,  # whether a process got a signal
        ("all_reduce", 2, False): 2,  # whether the next data could be read, and its targets
        ("all_reduce", 1, True): 2,  # the loss, on the device
    }
